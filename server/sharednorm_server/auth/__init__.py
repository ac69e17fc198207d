"""Who may do what: tokens and certificates."""
