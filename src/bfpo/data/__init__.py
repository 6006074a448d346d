"""From raw rows to token ids: adapters, sources, cleaning, tokenising, and the tables that show what happened."""
