"""The look of all pictures, heat maps, static pages. Knows not which experiment they show."""
