"""An architecture drawn: SVG, PNG or PDF (``svg``), Mermaid (``mermaid``), and as a table of its layers (``table``)."""
