"""Documents: what is read from files and records, checked before anything is made of it.

In: bytes, or plain data as JSON gives it. Out: plain data, descriptions, arrays; or `FileFormatError` and no other.
"""
