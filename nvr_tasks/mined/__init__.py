"""What stands between the stage `mine` and the mining core: data set and vectors in, parquet tables and pages out."""
