"""The space of a search: what each group of ops may be, what that costs and loses, and the model that it gives."""
