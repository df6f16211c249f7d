"""The published networks, their stages and losses. Product code never imports from here."""
