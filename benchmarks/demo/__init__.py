"""The demo: a real transformer and a real CNN become int8 programs."""
