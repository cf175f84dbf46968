-- Which Deployments have confirmed all their references to resources of this one since the feed epoch began. After a failover the sources of the rows may be
-- incomplete; until a Deployment is in here with the present epoch, it is asked before every deletion.
CREATE TABLE referrer_epoch (
    location text PRIMARY KEY,
    epoch    bigint NOT NULL
);

-- Since when, in the epochs of another Deployment, our references to it have been sent again: a grant from an older epoch is void, because the sweep has not seen what it permits.
CREATE TABLE swept_epoch (
    location text PRIMARY KEY,
    epoch    bigint NOT NULL
);

-- A fence or a grant travels under this class of advisory locks, keyed by the target's hash: shared by those who commit a reference, exclusive for those who
-- answer that there is none.
CREATE FUNCTION lock_target(exclusive boolean, location text, target text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF exclusive THEN
        PERFORM pg_advisory_xact_lock(3517, hashtext(location || ' ' || target));
    ELSE
        PERFORM pg_advisory_xact_lock_shared(3517, hashtext(location || ' ' || target));
    END IF;
END $$;

-- enter_write takes the shared form of the write fence and refuses while another API version takes the writes.
CREATE FUNCTION enter_write(version text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(3516, 1);
    IF (SELECT writable_version FROM ctl.deployment_state) <> version THEN
        RAISE EXCEPTION 'API version % does not take writes', version USING ERRCODE = 'DB003';
    END IF;
END $$;

-- changed aborts a transaction whose plan no longer holds.
CREATE FUNCTION changed(what text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', what USING ERRCODE = 'DB001';
END $$;

-- As in 0001, and for the shadows too.
CREATE OR REPLACE FUNCTION raise_epoch() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v text;
    e bigint;
BEGIN
    UPDATE ctl.feed_epoch SET epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint), raised_at = now(), timeline = ctl.current_timeline(),
           system_identifier = (SELECT system_identifier FROM pg_control_system())
    RETURNING epoch INTO e;
    FOR v IN SELECT DISTINCT scope FROM ctl.migrations WHERE scope <> 'ctl' LOOP
        EXECUTE format('UPDATE %I.resources SET change = pg_current_xact_id() WHERE change >= pg_snapshot_xmax(pg_current_snapshot()) AND change <> pg_current_xact_id()', v);
        EXECUTE format('UPDATE %I.resources SET shadow_change = pg_current_xact_id() WHERE shadow_change IS NOT NULL', v);
        EXECUTE format('UPDATE %I.horizon SET purged = NULL WHERE purged >= pg_snapshot_xmax(pg_current_snapshot())', v);
    END LOOP;
    RETURN e;
END $$;
