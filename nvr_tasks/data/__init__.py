"""From sources to tables: fetching, reading, checking, de-duplicating and decontaminating retrieval data sets."""
