"""Who is who in a federation, and what a site's owner agrees to. No files, clocks or sockets."""
