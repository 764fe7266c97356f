"""One command, `anabranch`; every verb hands over to the part that does the work."""
