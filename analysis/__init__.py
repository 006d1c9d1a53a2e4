"""Statistics, figures and reports from MLflow or a CSV file; nothing here trains."""

import lth_diet  # noqa: F401 -- before MLflow, which needs the home folder that it ensures
