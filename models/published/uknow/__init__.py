"""U-Know-DiffPAN (CVPR 2025): prior, teacher, student and distillation."""
