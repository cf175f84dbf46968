-- References of one API version's resources. search_path is that version's schema.

ALTER TABLE resources
    ADD shadow        smallint NOT NULL DEFAULT 0,   -- 0 none (copies, types that opt out, finished deletions), 1 active, 2 deleting
    ADD tasks         smallint NOT NULL DEFAULT 0,   -- what the owned-pending handler has to do
    ADD task_time     timestamptz,                   -- since when
    ADD task_error    text,                          -- why it is not done, for people
    ADD task_retry    timestamptz,
    ADD row_version   bigint NOT NULL DEFAULT 0,     -- even: open; odd: somebody has begun to delete it, or to prune a source
    ADD shadow_change xid8;                          -- set while work is due: the feed of the handlers

CREATE INDEX resources_tasks ON resources (shadow_change, shard) WHERE shadow_change IS NOT NULL;

-- Outgoing references. Written under the lock of the referrer's row, so that no unique index is needed; both indexes have many equal keys, which keeps them small.
CREATE TABLE refs (
    referrer text COLLATE "C" NOT NULL,
    field    text COLLATE "C" NOT NULL,
    target   text COLLATE "C" NOT NULL,
    location text COLLATE "C" NOT NULL,              -- service/region of the target; empty: here
    kind     smallint NOT NULL,                      -- 0 schema, 1 parent, 2 owner
    behavior smallint NOT NULL,
    tx_id    uuid,                                   -- granted by the target's Deployment, and not confirmed there yet
    uuid     uuid                                    -- the incarnation of a target in another Deployment
);
CREATE INDEX refs_referrer ON refs (referrer);
CREATE INDEX refs_target ON refs (target);
-- The sweep after a failover of a target's Deployment.
CREATE INDEX refs_location ON refs (location, referrer) WHERE location <> '';

-- Which other Deployments hold, or held, references to a resource.
CREATE TABLE sources (
    name       text COLLATE "C" NOT NULL,
    location   text COLLATE "C" NOT NULL,
    blocking   boolean NOT NULL,
    subscriber boolean NOT NULL,
    ownee      boolean NOT NULL,
    PRIMARY KEY (name, location)
);

-- Referrers elsewhere whose transaction is not known to have ended.
CREATE TABLE blockades (
    name       text COLLATE "C" NOT NULL,
    location   text COLLATE "C" NOT NULL,
    referrer   text COLLATE "C" NOT NULL,
    tx_id      uuid NOT NULL,
    attempt    int NOT NULL,
    shard      int NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (name, location, referrer, tx_id)
);
CREATE INDEX blockades_expiry ON blockades (expires_at);

-- "There is no reference to that target here" has been said: grants of it from before are void.
CREATE TABLE fences (
    location    text COLLATE "C" NOT NULL,
    target      text COLLATE "C" NOT NULL,
    uuid        uuid NOT NULL,
    epoch       bigint NOT NULL,                     -- the target's Deployment's
    row_version bigint NOT NULL,
    made_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (target, location, uuid)
);
CREATE INDEX fences_age ON fences (made_at);

-- How many purges of fences there have been: a grant from before the last one is void.
ALTER TABLE horizon ADD fences bigint NOT NULL DEFAULT 0;

-- write_references is the second half of a write: it runs after the rows are written, under their locks and those of the local targets, and looks at the state
-- that is about to be committed. Rows are looked up by name one after the other (OFFSET 0): a plan that was made while the tables were small must not join them another way once a
-- cascade has a hundred thousand rows. It rewrites the references of the rows that this transaction has written and raises
--
--   DB001  what the caller has read no longer holds: the closure, who was asked, a grant
--   DB002  a target does not exist or is being deleted; the detail says which
--
-- A save passes its name and references (r_*), a deletion its name with what was asked about it (d_*).
CREATE FUNCTION write_references(s_name text[],
    d_name text[], d_uuid uuid[], d_attempt bigint[], d_asked text[], d_async boolean[], d_told boolean[], d_epoch bigint,
    r_referrer text[], r_field text[], r_target text[], r_location text[], r_kind int[], r_behavior int[],
    r_tx uuid[], r_uuid uuid[], r_epoch bigint[], r_version bigint[], home_epoch bigint, home_fence bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    bad record;
    d_written text[];
    d_waiting text[];  -- those that stay readable
    d_left text[];     -- those that something here still refers to
    d_sources boolean; -- whether other Deployments refer to anything at all
    added int[];  -- places in r_* of the references that are new; NULL: all
BEGIN
    -- Only rows that this transaction has written: the others were refused, or would not change, and are not locked.
    s_name := ARRAY(SELECT n FROM unnest(s_name) AS n, LATERAL (SELECT change FROM resources WHERE name = n OFFSET 0) t WHERE t.change = pg_current_xact_id_if_assigned());
    d_written := ARRAY(SELECT n FROM unnest(d_name) AS n, LATERAL (SELECT change FROM resources WHERE name = n OFFSET 0) t WHERE t.change = pg_current_xact_id_if_assigned());
    IF cardinality(s_name) = 0 AND cardinality(d_written) = 0 THEN
        RETURN;
    END IF;

    IF home_epoch <> 0 THEN
        PERFORM ctl.lock_target(false, g.location, g.target)
            FROM (SELECT DISTINCT hashtext(l || ' ' || t), l, t FROM unnest(r_location, r_target, r_uuid) AS x (l, t, u) WHERE u IS NOT NULL ORDER BY 1) AS g (h, location, target);
        PERFORM ctl.lock_target(false, l, '') FROM (SELECT DISTINCT l FROM unnest(r_location, r_uuid) AS x (l, u) WHERE u IS NOT NULL ORDER BY 1) AS g;
        SELECT g.l INTO bad FROM unnest(r_location, r_uuid, r_epoch) AS g (l, u, e) JOIN ctl.swept_epoch w ON w.location = g.l WHERE g.u IS NOT NULL AND g.e < w.epoch LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'the grant of % is from before its failover', bad.l USING ERRCODE = 'DB001';
        END IF;
        SELECT g.t INTO bad FROM unnest(r_location, r_target, r_uuid, r_epoch, r_version) AS g (l, t, u, e, v)
            JOIN fences f ON f.target = g.t AND f.location = g.l AND f.uuid = g.u AND (f.epoch, f.row_version) > (g.e, g.v) LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'the grant for % has been voided by a fence', bad.t USING ERRCODE = 'DB001';
        END IF;
        -- After the fences: a purge takes them and is written down in one transaction.
        IF home_epoch <> (SELECT epoch FROM ctl.feed_epoch) OR home_fence <> (SELECT fences FROM horizon) THEN
            RAISE EXCEPTION 'the grants are from another history of this database' USING ERRCODE = 'DB001';
        END IF;
    END IF;

    IF cardinality(s_name) > 0 THEN
        IF EXISTS (SELECT FROM refs WHERE referrer = ANY (s_name)) THEN
            WITH old AS MATERIALIZED (
                SELECT ctid AS id, referrer, field, target, location, kind, behavior FROM refs WHERE referrer = ANY (s_name)
            ), new AS MATERIALIZED (
                SELECT n.* FROM unnest(r_referrer, r_field, r_target, r_location, r_kind, r_behavior, r_tx, r_uuid) WITH ORDINALITY AS n (referrer, field, target, location, kind, behavior, tx, uuid, i)
                JOIN unnest(s_name) AS w (name) ON w.name = n.referrer
            ), both_ AS MATERIALIZED (
                SELECT o.id, n.i, n.kind, n.behavior, n.tx, n.uuid, o.referrer, o.kind AS old_kind, (o.kind, o.behavior) <> (n.kind, n.behavior) OR n.tx IS NOT NULL AS differs
                FROM old o FULL JOIN new n ON (o.referrer, o.field, o.target, o.location) = (n.referrer, n.field, n.target, n.location)
            ), dropped AS (
                DELETE FROM refs WHERE ctid = ANY (ARRAY(SELECT id FROM both_ WHERE i IS NULL))
            ), changed AS (
                UPDATE refs r SET kind = b.kind, behavior = b.behavior, tx_id = coalesce(b.tx, r.tx_id), uuid = coalesce(b.uuid, r.uuid) FROM both_ b
                WHERE r.ctid = b.id AND b.differs AND r.ctid = ANY (ARRAY(SELECT id FROM both_ WHERE differs))
            ), flagged AS (
                UPDATE resources t SET tasks = tasks | 4, task_time = coalesce(task_time, now()), shadow_change = pg_current_xact_id()
                WHERE name = ANY (ARRAY(SELECT referrer FROM both_ WHERE i IS NULL AND old_kind = 0)) AND EXISTS (SELECT FROM sources s WHERE s.name = t.name AND s.ownee)
            )
            SELECT coalesce(array_agg(i), '{}') INTO added FROM both_ WHERE id IS NULL;
        END IF;
        WITH written AS (
            INSERT INTO refs (referrer, field, target, location, kind, behavior, tx_id, uuid)
            SELECT r, f, t, l, k, b, tx, u FROM unnest(r_referrer, r_field, r_target, r_location, r_kind, r_behavior, r_tx, r_uuid) WITH ORDINALITY AS n (r, f, t, l, k, b, tx, u, i)
            JOIN unnest(s_name) AS w (name) ON w.name = n.r
            WHERE added IS NULL OR i = ANY (added)
            RETURNING referrer, field, target, location, kind, behavior, tx_id
        )
        SELECT a.referrer, a.field, a.target, a.location, t.state, t.shadow INTO bad FROM written a LEFT JOIN LATERAL (SELECT state, shadow FROM resources WHERE name = a.target OFFSET 0) t ON true
        WHERE a.behavior <> 6 AND CASE WHEN a.location = '' THEN (t.state = 0 AND t.shadow = 1) IS NOT TRUE ELSE a.kind <> 2 AND a.tx_id IS NULL END LIMIT 1;
        IF FOUND AND bad.location <> '' THEN
            RAISE EXCEPTION 'the reference of % to % was dropped meanwhile, and needs a new grant', bad.referrer, bad.target USING ERRCODE = 'DB001';
        END IF;
        IF FOUND THEN
            RAISE EXCEPTION 'target % of % is missing', bad.target, bad.referrer USING ERRCODE = 'DB002',
                DETAIL = jsonb_build_object('referrer', bad.referrer, 'field', bad.field, 'target', bad.target,
                    'problem', CASE WHEN bad.state = 1 OR bad.shadow = 2 THEN 'deleting' WHEN bad.state = 0 THEN 'unconstrained' ELSE 'missing' END);
        END IF;
    END IF;

    IF cardinality(d_written) > 0 THEN
        -- The parent of a resource that stays readable waits for it.
        d_waiting := ARRAY(SELECT n FROM unnest(d_name, d_async) AS d (n, a) WHERE a);
        DELETE FROM refs WHERE referrer = ANY (d_written) AND NOT (kind = 1 AND referrer = ANY (d_waiting));
        d_left := ARRAY(SELECT n FROM unnest(d_written) AS n, LATERAL (SELECT FROM refs WHERE target = n AND location = '' LIMIT 1) r);
        SELECT r.referrer, n INTO bad FROM unnest(d_left) AS n, LATERAL (SELECT referrer FROM refs WHERE target = n AND location = '' AND behavior IN (1, 2, 3) OFFSET 0) r,
            LATERAL (SELECT state FROM resources WHERE name = r.referrer OFFSET 0) t WHERE t.state = 0 LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION '% refers to %', bad.referrer, bad.n USING ERRCODE = 'DB001';
        END IF;
        IF EXISTS (SELECT FROM blockades) THEN -- seldom are there any
            SELECT n INTO bad FROM unnest(d_written) AS n, LATERAL (SELECT expires_at FROM blockades WHERE name = n OFFSET 0) b WHERE b.expires_at > now() LIMIT 1;
            IF FOUND THEN
                RAISE EXCEPTION '% has a tentative blockade', bad.n USING ERRCODE = 'DB001';
            END IF;
            DELETE FROM blockades WHERE name = ANY (d_written);
        END IF;
        d_sources := EXISTS (SELECT FROM sources);
        IF d_sources THEN
            SELECT n INTO bad FROM unnest(d_name, d_asked) AS d (n, asked), LATERAL (SELECT location, blocking FROM sources WHERE name = n OFFSET 0) s
                WHERE s.blocking AND s.location <> ALL (d.asked::text[]) LIMIT 1;
            IF FOUND THEN
                RAISE EXCEPTION '% has a source that was not asked', bad.n USING ERRCODE = 'DB001';
            END IF;
        END IF;
        IF d_epoch <> 0 AND d_epoch <> (SELECT epoch FROM ctl.feed_epoch) THEN
            RAISE EXCEPTION 'the deletion was planned in another history of this database' USING ERRCODE = 'DB001';
        END IF;
        SELECT n INTO bad FROM (SELECT * FROM unnest(d_name, d_uuid, d_attempt) AS d (n, u, a) WHERE a <> 0 OR u IS NOT NULL OFFSET 0) d,
            LATERAL (SELECT uuid, row_version FROM resources WHERE name = n OFFSET 0) t
            WHERE d.a <> 0 AND t.row_version <> d.a OR d.u IS NOT NULL AND d.u <> t.uuid LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'the attempt to delete % was overtaken', bad.n USING ERRCODE = 'DB001';
        END IF;
        -- Who is left must be told: then the shadow stays, and with it the name.
        UPDATE resources SET shadow = 2, shadow_change = pg_current_xact_id(), task_time = now()
        WHERE ctid = ANY (ARRAY(
            SELECT t.id FROM (
                SELECT n FROM unnest(d_name, d_async, d_told) AS d (n, a, told) WHERE a OR told
                UNION SELECT n FROM unnest(d_left) AS n, LATERAL (SELECT FROM refs WHERE target = n AND location = '' AND kind <> 2 AND behavior <> 6 LIMIT 1) r
                UNION SELECT n FROM unnest(CASE WHEN d_sources THEN d_written END) AS n, LATERAL (SELECT FROM sources WHERE name = n AND (subscriber OR ownee) LIMIT 1) s
            ) AS n, LATERAL (SELECT ctid AS id, change, state FROM resources WHERE name = n.n OFFSET 0) t
            WHERE t.change = pg_current_xact_id() AND t.state <> 0));
        IF d_sources THEN
            DELETE FROM sources WHERE name = ANY (d_written) AND NOT EXISTS (SELECT FROM resources t WHERE t.name = sources.name AND t.shadow = 2);
        END IF;
    END IF;
END $$;

-- establish accepts new references of another Deployment to resources of this one, all or none, and returns one row a target: '' and the grant, or why not.
-- The lock conflicts with that of a deletion, and with nothing else.
CREATE FUNCTION establish(p_version text, p_location text, p_referrer text, p_tx uuid, p_attempt int, p_ttl interval, p_name text[], p_blocking boolean[], p_subscriber boolean[])
RETURNS TABLE (target text, problem text, target_uuid uuid, target_epoch bigint, target_version bigint, owner text) LANGUAGE plpgsql AS $$
DECLARE
    self text := (SELECT region FROM ctl.deployment_state);
BEGIN
    PERFORM ctl.enter_write(p_version);
    PERFORM FROM resources WHERE name = ANY (p_name) ORDER BY name FOR KEY SHARE;
    RETURN QUERY SELECT n, CASE WHEN t.name IS NULL OR t.state = 2 AND t.shadow <> 2 THEN 'missing' WHEN t.owning_region <> self THEN 'elsewhere'
            WHEN t.state <> 0 THEN 'deleting' WHEN t.shadow <> 1 THEN 'unconstrained' END, t.uuid, NULL::bigint, NULL::bigint, t.owning_region
        FROM unnest(p_name) AS n LEFT JOIN LATERAL (SELECT * FROM resources WHERE name = n OFFSET 0) t ON true
        WHERE (t.state = 0 AND t.owning_region = self AND t.shadow = 1) IS NOT TRUE;
    IF FOUND THEN
        RETURN;
    END IF;
    -- Somebody may have been told that nothing refers to it: this grant is newer than that, and whoever tried to delete it must begin again.
    UPDATE resources SET row_version = row_version + 1 WHERE name = ANY (p_name) AND row_version % 2 = 1;
    -- A late message of an attempt that has been repeated leaves nothing behind.
    IF NOT EXISTS (SELECT FROM blockades b WHERE b.location = p_location AND b.referrer = p_referrer AND b.tx_id = p_tx AND b.attempt > p_attempt AND b.name = ANY (p_name)) THEN
        DELETE FROM blockades b WHERE b.location = p_location AND b.referrer = p_referrer AND b.tx_id = p_tx AND b.attempt < p_attempt AND b.name = ANY (p_name);
        INSERT INTO sources AS s (name, location, blocking, subscriber, ownee)
        SELECT n, p_location, bool_or(b), bool_or(c), false FROM unnest(p_name, p_blocking, p_subscriber) AS x (n, b, c) GROUP BY n ORDER BY n
        ON CONFLICT (name, location) DO UPDATE SET blocking = s.blocking OR excluded.blocking, subscriber = s.subscriber OR excluded.subscriber
        WHERE excluded.blocking AND NOT s.blocking OR excluded.subscriber AND NOT s.subscriber;
        INSERT INTO blockades (name, location, referrer, tx_id, attempt, shard, expires_at)
        SELECT DISTINCT ON (n) n, p_location, p_referrer, p_tx, p_attempt, t.shard, now() + p_ttl FROM unnest(p_name) AS n JOIN resources t ON t.name = n ORDER BY n
        ON CONFLICT (name, location, referrer, tx_id) DO UPDATE SET attempt = excluded.attempt, expires_at = excluded.expires_at;
    END IF;
    RETURN QUERY SELECT t.name, '', t.uuid, (SELECT epoch FROM ctl.feed_epoch), t.row_version, t.owning_region FROM resources t WHERE t.name = ANY (p_name);
END $$;

-- confirm_references says that references of another Deployment are committed. It returns the targets that do not exist.
CREATE FUNCTION confirm_references(p_version text, p_location text, p_referrer text[], p_name text[], p_blocking boolean[], p_subscriber boolean[], p_tx uuid[])
RETURNS TABLE (missing text) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM ctl.enter_write(p_version);
    PERFORM FROM resources WHERE name = ANY (p_name) ORDER BY name FOR KEY SHARE;
    INSERT INTO sources AS s (name, location, blocking, subscriber, ownee)
    SELECT n, p_location, bool_or(b), bool_or(c), false FROM unnest(p_name, p_blocking, p_subscriber) AS x (n, b, c) JOIN resources t ON t.name = n
        WHERE t.shadow <> 0 GROUP BY n ORDER BY n
    ON CONFLICT (name, location) DO UPDATE SET blocking = s.blocking OR excluded.blocking, subscriber = s.subscriber OR excluded.subscriber
    WHERE excluded.blocking AND NOT s.blocking OR excluded.subscriber AND NOT s.subscriber;
    DELETE FROM blockades b USING unnest(p_referrer, p_name, p_tx) AS x (r, n, tx)
        WHERE (b.name, b.location, b.referrer, b.tx_id) = (x.n, p_location, x.r, x.tx);
    RETURN QUERY SELECT DISTINCT n FROM unnest(p_name) AS n WHERE NOT EXISTS (SELECT FROM resources t WHERE t.name = n AND t.shadow <> 0);
END $$;

-- check_references answers whether references to targets are left here, and leaves a fence where the answer is no: a save that holds an older grant
-- then fails. behaviors are those that count; has_any counts all that were established.
CREATE FUNCTION check_references(p_version text, p_location text, p_name text[], p_uuid uuid[], p_epoch bigint[], p_row_version bigint[], p_behavior int[], p_excluding text[], p_limit int)
RETURNS TABLE (asked text, found int, has_any boolean, sample text[]) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM ctl.enter_write(p_version);
    PERFORM ctl.lock_target(true, p_location, t) FROM (SELECT DISTINCT hashtext(p_location || ' ' || n) AS h, n AS t FROM unnest(p_name) AS n ORDER BY 1) AS x;
    INSERT INTO fences AS f (location, target, uuid, epoch, row_version)
    SELECT p_location, q.n, q.u, q.e, q.v FROM unnest(p_name, p_uuid, p_epoch, p_row_version) AS q (n, u, e, v)
        WHERE NOT EXISTS (SELECT FROM refs r WHERE r.target = q.n AND r.location = p_location AND r.kind <> 2 AND r.behavior = ANY (p_behavior) AND r.referrer <> ALL (p_excluding))
        ORDER BY q.n
    ON CONFLICT (target, location, uuid) DO UPDATE SET epoch = excluded.epoch, row_version = excluded.row_version, made_at = now()
    WHERE (f.epoch, f.row_version) < (excluded.epoch, excluded.row_version);
    RETURN QUERY SELECT q.n, cardinality(s.names), EXISTS (SELECT FROM refs r WHERE r.target = q.n AND r.location = p_location AND r.kind <> 2 AND r.behavior <> 6), s.names[:10]
        FROM unnest(p_name) WITH ORDINALITY AS q (n, i),
            LATERAL (SELECT ARRAY(SELECT r.referrer FROM refs r WHERE r.target = q.n AND r.location = p_location AND r.kind <> 2
                AND r.behavior = ANY (p_behavior) AND r.referrer <> ALL (p_excluding) LIMIT p_limit) AS names) s
        ORDER BY q.i;
END $$;

-- finish_deletion ends a deletion, once nobody needs to be told of it any more: every source has been checked in this epoch, no local referrer is left. Only now can the name be
-- used again.
CREATE FUNCTION finish_deletion(p_version text, p_name text, p_uuid uuid, p_epoch bigint, p_checked text[]) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    self text := (SELECT region FROM ctl.deployment_state);
BEGIN
    PERFORM ctl.enter_write(p_version);
    PERFORM FROM resources WHERE name = p_name AND uuid = p_uuid AND shadow = 2 AND NOT (block_deletion AND state = 1) FOR UPDATE;
    IF NOT FOUND
        OR p_epoch <> (SELECT f.epoch FROM ctl.feed_epoch f)
        OR EXISTS (SELECT FROM sources WHERE name = p_name AND (subscriber OR ownee) AND location <> ALL (p_checked))
        OR EXISTS (SELECT FROM refs WHERE target = p_name AND location = '' AND behavior <> 6 AND kind <> 2)
    THEN
        RETURN false;
    END IF;
    DELETE FROM sources WHERE name = p_name;
    DELETE FROM blockades WHERE name = p_name;
    DELETE FROM refs WHERE referrer = p_name;
    UPDATE resources SET shadow = 0, tasks = 0, task_time = NULL, task_error = NULL, task_retry = NULL, shadow_change = NULL,
        state = 2, body = NULL, meta = '{}', delete_time = CASE WHEN state = 1 THEN now() ELSE delete_time END,
        epoch = CASE WHEN state = 1 THEN greatest(epoch, (SELECT f.epoch FROM ctl.feed_epoch f)) ELSE epoch END,
        resource_version = resource_version + (state = 1)::int, change = CASE WHEN state = 1 THEN pg_current_xact_id() ELSE change END
    WHERE name = p_name;
    RETURN true;
END $$;
