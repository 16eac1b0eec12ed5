"""Modules that a task puts between a model and its output matrix (``Source.heads``); they load torch when used."""
