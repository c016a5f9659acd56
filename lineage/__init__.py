"""From candidates to parents, relations and a tree.

Read `engine` first: the main path on one screen.
"""
