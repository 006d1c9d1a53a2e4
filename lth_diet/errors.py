class UserError(Exception):
    """Bad input, told in one sentence that names file, key, value and what is allowed; a recipe exits with 2."""
