"""Populations of small networks whose making is known: recipes, measured labels and descent."""
