"""What measures: profiles, timelines, and the machine they were taken on."""
