"""The search: a study folder that can be resumed, trials at matched cost, and what people see of them."""
