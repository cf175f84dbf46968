package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/postgres"
)

// feedRead measures what it costs to read a changed row and to throw it away: the change feed against a stream of logical decoding, of the same
// backlog. The CPU is that of the server and of this process, which is the reader of both.
func feedRead(ctx context.Context, opt options) (res result, err error) {
	changes := cmp.Or(opt.changes, opt.rows, 300_000)
	rows := cmp.Or(opt.rows, changes)
	w, err := newWorld(ctx, opt)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := seed(ctx, w.sourceConn, rows); err != nil {
		return res, err
	}
	st, err := postgres.Open(ctx, postgres.Config{DSN: w.source.DSN(w.sourceDB), Service: service, Region: sourceRegion, Version: "v1", Ring: ring, Logger: quiet})
	if err != nil {
		return res, err
	}
	defer st.Close()
	if _, err := w.sourceConn.Exec(ctx, "CREATE PUBLICATION "+w.slot+" FOR TABLE v1.resources"); err != nil {
		return res, err
	}
	if _, err := w.sourceConn.Exec(ctx, "SELECT pg_create_logical_replication_slot($1, 'pgoutput')", w.slot); err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.dropSlot(context.WithoutCancel(ctx))) }()

	// The first cursor stands behind the seed, as the slot does.
	cursor, _, err := st.Feed().Now(ctx)
	if err != nil {
		return res, err
	}
	readers := map[string]func() (int, error){
		"ours": func() (n int, err error) {
			n, cursor, err = drainFeed(ctx, st.Feed(), cursor)
			return n, err
		},
		"native": func() (int, error) { return w.drainSlot(ctx) },
	}
	costs := map[string][]float64{}
	for run := range opt.runs {
		if err := w.backlog(ctx, changes, rows); err != nil {
			return res, err
		}
		if err := w.tidy(ctx); err != nil {
			return res, err
		}
		names := []string{"ours", "native"}
		if run%2 == 1 {
			names = []string{"native", "ours"}
		}
		for _, name := range names {
			server, err := serverCPU(w.source)
			if err != nil {
				return res, err
			}
			own, began := ownCPU(), time.Now()
			n, err := readers[name]()
			if err != nil {
				return res, fmt.Errorf("%s: %w", name, err)
			}
			took := time.Since(began)
			used, err := serverCPU(w.source)
			if err != nil {
				return res, err
			}
			if n != changes+markers {
				return res, fmt.Errorf("%s: read %d rows of %d", name, n, changes+markers)
			}
			s := float64((used - server).Microseconds()) / float64(n)
			c := float64((ownCPU() - own).Microseconds()) / float64(n)
			costs[name] = append(costs[name], s+c)
			fmt.Fprintf(opt.out, "run %d  %-6s  %8.0f rows/s  server %5.2f  reader %5.2f us/row  %s\n", run+1, name, float64(n)/took.Seconds(), s, c, load())
		}
	}
	return smaller(median(costs["ours"]), median(costs["native"]), "us of CPU per row read"), nil
}

// drainFeed reads the change feed to its end.
func drainFeed(ctx context.Context, f *feed.Feed, c feed.Cursor) (n int, next feed.Cursor, err error) {
	for {
		r, err := f.ReadTuples(ctx, c, feed.Range{From: 0, To: ring}, destRegion, func([]byte) error { return nil })
		if err != nil {
			return n, c, err
		}
		n, c = n+r.Rows, r.Cursor
		if !r.More {
			return n, c, nil
		}
	}
}

// drainSlot reads the slot up to the present end of the log, as a subscription does, and counts the changes. It speaks the streaming protocol as
// far as that needs: XLogData ('w') carries a change, a keepalive ('k') wants an answer ('r').
func (w *world) drainSlot(ctx context.Context) (n int, err error) {
	var end string
	if err := w.sourceConn.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()").Scan(&end); err != nil {
		return 0, err
	}
	until, err := parseLSN(end)
	if err != nil {
		return 0, err
	}
	config, err := pgconn.ParseConfig(w.source.DSN(w.sourceDB))
	if err != nil {
		return 0, err
	}
	config.RuntimeParams["replication"] = "database"
	c, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return 0, err
	}
	defer c.Close(context.WithoutCancel(ctx))
	c.Frontend().SendQuery(&pgproto3.Query{String: "START_REPLICATION SLOT " + w.slot + " LOGICAL 0/0 (proto_version '1', publication_names '" + w.slot + "')"})
	if err := c.Frontend().Flush(); err != nil {
		return 0, err
	}
	confirm := func(lsn uint64) error {
		status := []byte{'r'}
		for range 3 {
			status = binary.BigEndian.AppendUint64(status, lsn) // written, flushed, applied
		}
		c.Frontend().Send(&pgproto3.CopyData{Data: append(status, make([]byte, 9)...)}) // the clock and whether to answer do not matter
		return c.Frontend().Flush()
	}
	for {
		message, err := c.ReceiveMessage(ctx)
		if err != nil {
			return n, err
		}
		switch m := message.(type) {
		case *pgproto3.ErrorResponse:
			return n, pgconn.ErrorResponseToPgError(m)
		case *pgproto3.CopyData:
			switch {
			case m.Data[0] == 'w' && m.Data[25] == 'U': // 1 + start, end, clock of 8 bytes each, then pgoutput's message: an update
				n++
			case m.Data[0] == 'k':
				at := binary.BigEndian.Uint64(m.Data[1:])
				if at >= until { // everything before it has been sent
					return n, confirm(until)
				}
				if m.Data[17] == 1 {
					if err := confirm(0); err != nil {
						return n, err
					}
				}
			}
		}
	}
}

// dropSlot waits for the server to notice that the reader has gone.
func (w *world) dropSlot(ctx context.Context) error {
	return poll(ctx, time.Minute, "drop the slot", func(ctx context.Context) (bool, error) {
		var free bool
		if err := w.sourceConn.QueryRow(ctx, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = $1", w.slot).Scan(&free); err != nil || !free {
			return false, err
		}
		_, err := w.sourceConn.Exec(ctx, "SELECT pg_drop_replication_slot($1)", w.slot)
		return true, err
	})
}

func parseLSN(s string) (uint64, error) {
	high, low, _ := strings.Cut(s, "/")
	h, err1 := strconv.ParseUint(high, 16, 32)
	l, err2 := strconv.ParseUint(low, 16, 32)
	return h<<32 | l, errors.Join(err1, err2)
}
