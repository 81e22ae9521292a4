"""How frozen layers of each library present themselves: one file a library."""
