"""For those who operate a site: what is known of the peers, where it can be seen."""
