"""Storage of a running study: records in its folder or in PostgreSQL, and the claims of its workers."""
