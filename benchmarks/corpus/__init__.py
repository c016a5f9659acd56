"""Real models of other people with known relations: the list, the fetching, the scoring."""
