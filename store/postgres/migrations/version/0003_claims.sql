-- What is written under a claim on shards that has been revoked is refused, by every table. search_path is the version's schema.

SELECT ctl.fence(t::regclass) FROM unnest(ARRAY['resources', 'horizon', 'refs', 'sources', 'blockades', 'fences']) AS t;
