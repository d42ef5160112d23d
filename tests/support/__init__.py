"""What several tests share: invented records, toy notebooks, and watching a GPU."""
