"""Trained models as folders: config.json, model.safetensors, the tokenizer and a model card; no pickle.

``hybridnas.export.folder.export`` writes one, ``hybridnas.export.load.load`` reads it and needs nothing but the folder.
"""
