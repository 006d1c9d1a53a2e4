"""Configuration: the schema, reading and overriding YAML files, and run ids.

May import the packages listed earlier in the map of CONTRIBUTING.md, but not torch, Composer, MLflow or Ray.
"""
