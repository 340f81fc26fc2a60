-- SPDX-License-Identifier: Apache-2.0
-- Functions and triggers of a store on Postgres; see fasten/repository/roles.py.

CREATE OR REPLACE FUNCTION $prune(
  p_record text, p_service text, p_node text, p_class text, p_through bigint,
  p_frontier text
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$$$
DECLARE
  v_head record;
  v_said jsonb;
  v_period numeric;
  v_hash text;
  v_count bigint;
BEGIN
  SELECT seq, pruned_seq INTO v_head FROM $head
  WHERE service_id = p_service AND source_node_id = p_node
    AND retention_class = p_class
  FOR UPDATE;
  IF NOT FOUND OR p_through <= v_head.pruned_seq OR p_through > v_head.seq THEN
    RAISE EXCEPTION 'fasten: nothing of %/%/% to cut through %',
      p_service, p_node, p_class, p_through;
  END IF;
  SELECT detail::jsonb INTO v_said FROM $log
  WHERE id = p_record AND domain = 'fasten' AND code = 'RETENTION_SWEEP_RAN';
  IF NOT EXISTS (
    SELECT FROM jsonb_array_elements(coalesce(v_said -> 'cuts', '[]')) AS said
    WHERE said ->> 'service' = p_service AND said ->> 'node' = p_node
      AND said ->> 'class' = p_class AND (said ->> 'to_seq')::bigint >= p_through
  ) THEN
    RAISE EXCEPTION 'fasten: row % records no such cut', p_record;
  END IF;
  SELECT (value::jsonb ->> p_class)::numeric INTO v_period FROM $meta
  WHERE key = 'retention:' || p_service;
  IF v_period IS NULL OR v_period < 1 THEN
    RAISE EXCEPTION 'fasten: no period of class % is on record', p_class;
  END IF;
  IF EXISTS (
    SELECT FROM $log AS l
    WHERE l.service_id = p_service AND l.source_node_id = p_node
      AND l.retention_class = p_class AND l.monotonic_seq > v_head.pruned_seq
      AND l.monotonic_seq <= p_through
      AND l.timestamp >= clock_timestamp() - make_interval(secs => v_period::float8)
  ) THEN
    RAISE EXCEPTION 'fasten: rows up to % have not expired', p_through;
  END IF;
  IF EXISTS (
    SELECT FROM $log AS l, $meta AS m
    WHERE l.service_id = p_service AND l.source_node_id = p_node
      AND l.retention_class = p_class AND l.monotonic_seq > v_head.pruned_seq
      AND l.monotonic_seq <= p_through
      AND m.key LIKE 'hold:%' AND m.value::jsonb ->> 'lifted_at' IS NULL
      AND m.value::jsonb ->> 'value' = CASE m.value::jsonb ->> 'field'
        WHEN 'target' THEN l.target WHEN 'actor' THEN l.actor
        WHEN 'code' THEN l.code END
  ) THEN
    RAISE EXCEPTION 'fasten: a row up to % is held', p_through;
  END IF;
  IF EXISTS (
    SELECT FROM $log AS l, $meta AS m
    WHERE l.service_id = p_service AND l.source_node_id = p_node
      AND l.retention_class = p_class AND l.monotonic_seq > v_head.pruned_seq
      AND l.monotonic_seq <= p_through
      AND m.key = 'ships' AND m.value = 'true' AND l.shipped_at IS NULL
  ) THEN
    RAISE EXCEPTION 'fasten: a row up to % has not been shipped', p_through;
  END IF;
  SELECT l.hash INTO v_hash FROM $log AS l
  WHERE l.service_id = p_service AND l.source_node_id = p_node
    AND l.retention_class = p_class AND l.monotonic_seq = p_through;
  SELECT count(*) INTO v_count FROM $log AS l
  WHERE l.service_id = p_service AND l.source_node_id = p_node
    AND l.retention_class = p_class AND l.monotonic_seq > v_head.pruned_seq
    AND l.monotonic_seq <= p_through;
  IF v_hash IS NULL THEN
    RAISE EXCEPTION 'fasten: there is no row %', p_through;
  END IF;
  -- First of all the head: what it has passed may go, says the trigger of the log.
  UPDATE $head
  SET pruned_seq = p_through, pruned_hash = v_hash,
    pruned_count = pruned_count + v_count, pruned_frontier = p_frontier
  WHERE service_id = p_service AND source_node_id = p_node
    AND retention_class = p_class;
  DELETE FROM $log
  WHERE service_id = p_service AND source_node_id = p_node
    AND retention_class = p_class AND monotonic_seq > v_head.pruned_seq
    AND monotonic_seq <= p_through;
  RETURN v_count;
END $$$$;
-- ;
-- Without arguments: thins checkpoints, and drops erasures of so long ago that whatever
-- was born before has expired.
CREATE OR REPLACE FUNCTION $prune() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$$$
DECLARE
  v_count bigint;
  v_longest numeric;
BEGIN
  DELETE FROM $checkpoint AS old
  WHERE old.created_at < clock_timestamp() - interval '30 days' AND EXISTS (
    SELECT FROM $checkpoint AS later
    WHERE later.service_id = old.service_id
      AND later.source_node_id = old.source_node_id
      AND later.retention_class = old.retention_class
      AND later.created_at > old.created_at
      AND date_trunc('day', later.created_at AT TIME ZONE 'UTC')
        = date_trunc('day', old.created_at AT TIME ZONE 'UTC'));
  GET DIAGNOSTICS v_count = ROW_COUNT;
  SELECT max(period.value::numeric) INTO v_longest
  FROM $meta AS m, jsonb_each_text(CASE WHEN jsonb_typeof(m.value::jsonb) = 'object'
    THEN m.value::jsonb ELSE '{}' END) AS period
  WHERE m.key LIKE 'retention:%';
  DELETE FROM $erasure AS e
  WHERE e.erased_at < clock_timestamp() - make_interval(secs => v_longest::float8)
    AND NOT EXISTS (
    SELECT FROM $writer AS w
    WHERE w.updated_at > clock_timestamp() - interval '30 days'
      AND (w.followed_at IS NULL OR w.followed_at < e.erased_at));
  RETURN v_count;
END $$$$;
-- ;
CREATE OR REPLACE FUNCTION $erase(p_record text, p_ids text[], p_fields text[])
RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$$$
DECLARE
  v_row record;
  v_said jsonb;
  v_field text;
  v_value text;
  v_key bytea;
  v_keys text[];
  v_leaves text[];
  v_gone text[];
  v_count bigint := 0;
BEGIN
  SELECT detail::jsonb INTO v_said FROM $log
  WHERE id = p_record AND domain = 'fasten' AND code = 'AUDIT_ROW_ERASED';
  IF v_said IS NULL OR NOT v_said -> 'ids' ?& p_ids
    OR NOT v_said -> 'fields' ?& p_fields
    OR NOT p_fields <@ ARRAY[$committed] THEN
    RAISE EXCEPTION 'fasten: row % records no such erasure', p_record;
  END IF;
  FOR v_row IN SELECT * FROM $log WHERE id = ANY (p_ids) FOR UPDATE LOOP
    v_keys := '{}'; v_leaves := '{}'; v_gone := '{}';
    FOREACH v_field IN ARRAY ARRAY[$committed] LOOP
      v_value := to_jsonb(v_row) ->> v_field;
      IF v_row.salt ~ '^[0-9a-f]{32}$$' THEN
        v_key := sha256(convert_to(v_row.salt || ':' || v_field, 'UTF8'));
      ELSE
        v_key := decode(v_row.salt::jsonb -> 'keys' ->> v_field, 'hex');
      END IF;
      IF v_value IS NULL THEN
        IF v_row.salt LIKE '{%' AND v_row.salt::jsonb -> 'leaves' ? v_field THEN
          v_leaves := v_leaves || format('"%s":"%s"', v_field,
            v_row.salt::jsonb -> 'leaves' ->> v_field);
        END IF;
      ELSIF v_field = ANY (p_fields) AND NOT (v_field = 'detail'
        AND v_row.domain = 'fasten' AND v_row.code IN ($records)) THEN
        -- detail is stored as the JSON that was sealed; a text is spelled as one.
        v_leaves := v_leaves || format('"%s":"%s"', v_field, encode(sha256(
          v_key || convert_to(CASE v_field WHEN 'detail' THEN v_value
            ELSE to_json(v_value)::text END, 'UTF8')), 'hex'));
        v_gone := v_gone || v_field;
      ELSE
        v_keys := v_keys || format('"%s":"%s"', v_field, encode(v_key, 'hex'));
      END IF;
    END LOOP;
    IF cardinality(v_gone) > 0 THEN
      UPDATE $log SET
        actor = CASE WHEN 'actor' = ANY (v_gone) THEN NULL ELSE actor END,
        client = CASE WHEN 'client' = ANY (v_gone) THEN NULL ELSE client END,
        detail = CASE WHEN 'detail' = ANY (v_gone) THEN NULL ELSE detail END,
        on_behalf_of = CASE WHEN 'on_behalf_of' = ANY (v_gone) THEN NULL
          ELSE on_behalf_of END,
        reason = CASE WHEN 'reason' = ANY (v_gone) THEN NULL ELSE reason END,
        target = CASE WHEN 'target' = ANY (v_gone) THEN NULL ELSE target END,
        salt = '{"keys":{' || array_to_string(v_keys, ',') || '},"leaves":{'
          || array_to_string(v_leaves, ',') || '}}'
      WHERE id = v_row.id;
      v_count := v_count + 1;
    END IF;
  END LOOP;
  RETURN v_count;
END $$$$;
-- ;
CREATE OR REPLACE FUNCTION $erase(
  p_field text, p_salt text, p_digest text, p_erased_at timestamptz, p_fields text,
  p_reason text
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$$$
BEGIN
  IF p_erased_at > clock_timestamp() THEN
    RAISE EXCEPTION 'fasten: nothing is erased before it happens';
  END IF;
  INSERT INTO $erasure AS e (field, salt, digest, erased_at, fields, reason)
  VALUES (p_field, p_salt, p_digest, p_erased_at, p_fields, p_reason)
  ON CONFLICT (field, salt, digest) DO UPDATE
  SET erased_at = greatest(e.erased_at, excluded.erased_at),
    fields = excluded.fields, reason = excluded.reason;
END $$$$;
-- ;
-- One function for all triggers: what is not named here is refused.
CREATE OR REPLACE FUNCTION $guard() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$$$
BEGIN
  CASE TG_ARGV[0] || ' ' || TG_OP
  WHEN 'log UPDATE' THEN
    IF NOT ($sealed_changed
     OR $filled_in)
     AND (CASE WHEN $emptied
       THEN NEW.salt LIKE '{"keys":{%},"leaves":{"%}}'
       ELSE NEW.salt = OLD.salt END) THEN
      RETURN NEW;
    END IF;
  WHEN 'log DELETE' THEN
    IF NOT EXISTS (
      SELECT FROM gone AS g LEFT JOIN $head AS h
        ON h.service_id = g.service_id AND h.source_node_id = g.source_node_id
        AND h.retention_class = g.retention_class
      WHERE h.pruned_seq IS NULL OR h.pruned_seq < g.monotonic_seq
    ) THEN
      RETURN NULL;
    END IF;
  WHEN 'head UPDATE' THEN
    IF (NEW.service_id, NEW.source_node_id, NEW.retention_class)
      = (OLD.service_id, OLD.source_node_id, OLD.retention_class)
      AND NEW.seq >= OLD.seq AND NEW.count >= OLD.count
      AND NEW.pruned_seq >= OLD.pruned_seq AND NEW.pruned_seq <= NEW.seq
      AND NEW.pruned_count >= OLD.pruned_count AND NEW.pruned_count <= NEW.count THEN
      RETURN NEW;
    END IF;
  WHEN 'node UPDATE' THEN
    IF (NEW.service_id, NEW.source_node_id) = (OLD.service_id, OLD.source_node_id)
      AND NEW.seq >= OLD.seq THEN
      RETURN NEW;
    END IF;
  WHEN 'writer UPDATE' THEN
    IF NEW.writer_id = OLD.writer_id AND NEW.watermark >= OLD.watermark THEN
      RETURN NEW;
    END IF;
  WHEN 'meta UPDATE' THEN
    IF NEW.key = OLD.key THEN
      RETURN NEW;
    END IF;
  WHEN 'checkpoint DELETE' THEN
    IF OLD.created_at < clock_timestamp() - interval '30 days' THEN
      RETURN OLD;
    END IF;
  WHEN 'erasure UPDATE' THEN
    IF (NEW.field, NEW.salt, NEW.digest) = (OLD.field, OLD.salt, OLD.digest)
      AND NEW.erased_at >= OLD.erased_at THEN
      RETURN NEW;
    END IF;
  WHEN 'erasure DELETE' THEN
    IF OLD.erased_at < clock_timestamp() - interval '1 day' THEN
      RETURN OLD;
    END IF;
  ELSE
  END CASE;
  RAISE EXCEPTION 'fasten: % of % is not allowed', TG_OP, TG_TABLE_NAME
    USING HINT = 'rows are changed by fasten sweep and fasten erase only',
      ERRCODE = 'insufficient_privilege';
END $$$$;
-- ;
CREATE OR REPLACE TRIGGER fasten_update BEFORE UPDATE ON $log
  FOR EACH ROW EXECUTE FUNCTION $guard('log');
CREATE OR REPLACE TRIGGER fasten_delete AFTER DELETE ON $log
  REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION $guard('log');
CREATE OR REPLACE TRIGGER fasten_change BEFORE UPDATE OR DELETE ON $head
  FOR EACH ROW EXECUTE FUNCTION $guard('head');
CREATE OR REPLACE TRIGGER fasten_change BEFORE UPDATE OR DELETE ON $node
  FOR EACH ROW EXECUTE FUNCTION $guard('node');
CREATE OR REPLACE TRIGGER fasten_change BEFORE UPDATE OR DELETE ON $writer
  FOR EACH ROW EXECUTE FUNCTION $guard('writer');
CREATE OR REPLACE TRIGGER fasten_change BEFORE UPDATE OR DELETE ON $meta
  FOR EACH ROW EXECUTE FUNCTION $guard('meta');
CREATE OR REPLACE TRIGGER fasten_change BEFORE UPDATE OR DELETE ON $checkpoint
  FOR EACH ROW EXECUTE FUNCTION $guard('checkpoint');
CREATE OR REPLACE TRIGGER fasten_change BEFORE UPDATE OR DELETE ON $erasure
  FOR EACH ROW EXECUTE FUNCTION $guard('erasure');
-- ;
DO $$$$
DECLARE
  v_table text;
BEGIN
  FOREACH v_table IN ARRAY ARRAY['$log', '$head', '$node', '$writer', '$meta',
    '$checkpoint', '$erasure'] LOOP
    EXECUTE format('CREATE OR REPLACE TRIGGER fasten_truncate BEFORE TRUNCATE ON %s '
      'FOR EACH STATEMENT EXECUTE FUNCTION $guard(''table'')', v_table);
    -- ALWAYS: session_replication_role = replica does not switch these off.
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER fasten_truncate', v_table);
    IF v_table = '$log' THEN
      EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER fasten_update, '
        'ENABLE ALWAYS TRIGGER fasten_delete', v_table);
    ELSE
      EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER fasten_change', v_table);
    END IF;
  END LOOP;
END $$$$;
-- ;
ALTER FUNCTION $prune(text, text, text, text, bigint, text) OWNER TO $owner;
ALTER FUNCTION $prune() OWNER TO $owner;
ALTER FUNCTION $erase(text, text[], text[]) OWNER TO $owner;
ALTER FUNCTION $erase(text, text, text, timestamptz, text, text) OWNER TO $owner;
ALTER FUNCTION $guard() OWNER TO $owner;
REVOKE ALL ON FUNCTION $prune(text, text, text, text, bigint, text), $prune(),
  $erase(text, text[], text[]),
  $erase(text, text, text, timestamptz, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION $prune(text, text, text, text, bigint, text), $prune()
  TO fasten_app;
GRANT EXECUTE ON FUNCTION $erase(text, text[], text[]),
  $erase(text, text, text, timestamptz, text, text) TO fasten_retention;
