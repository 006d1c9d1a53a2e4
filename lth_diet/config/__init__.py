"""Configuration: the schema, reading and overriding YAML files, and run ids.

May import errors, files, data and scores, but not torch, Composer, MLflow or Ray.
"""
