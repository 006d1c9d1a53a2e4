"""Networks for small images and their initialization.

May import nothing else of lth_diet.
"""
