"""Statistics, figures and reports from MLflow or a CSV file; nothing here trains."""
