"""One round: a site's part in it, the server's, and the transport inside one process."""
