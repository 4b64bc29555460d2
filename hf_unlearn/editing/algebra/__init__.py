"""The algebra of constrained edits: problems, solvers and certificates, on tensors alone."""
