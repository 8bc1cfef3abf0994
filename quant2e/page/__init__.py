"""Pages: sections of text, tables and charts in; one HTML file that opens without a network out."""
