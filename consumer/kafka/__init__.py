"""Everything that touches aiokafka; nothing outside this package imports it."""
