"""Updates of a trainer that has several ranks: the ranks agree on each step, and one or all of them send."""
