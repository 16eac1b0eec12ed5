"""What a study and its trials are on disk: records, folder, locks. Readable without torch or Optuna."""
