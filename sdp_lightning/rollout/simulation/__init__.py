"""A run on a virtual clock: the real executor, with a modelled engine and a modelled trainer."""
