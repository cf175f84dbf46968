package apiserver

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	dbcontrollerv1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
	"github.com/dbcontroller/db-controller/store/listquery"
)

// Changes is the change feed of the local database: feed.Feed.
type Changes interface {
	Now(ctx context.Context) (feed.Cursor, time.Time, error)
	ReadTuples(ctx context.Context, c feed.Cursor, shards feed.Range, region string, emit func(tuple []byte) error) (feed.Read, error)
	ReadResources(ctx context.Context, c feed.Cursor, sel feed.Selection, emit func(*store.Resource) error) (feed.Read, error)
	Follow(ctx context.Context, want feed.Interest, step func(context.Context) (more bool, err error)) error
}

// Limits of a watch.
const (
	// watchPage is the page size of snapshots.
	watchPage = 100
	// watchChunk is the size in bytes from which on a message is sent.
	watchChunk = 1 << 20
	// watchHeld is how many bytes of bodies are held of one read of the feed. Of what is beyond, only names are, and the bodies
	// are read again: a slow watcher must not keep a connection of the database busy, nor fill the memory.
	watchHeld = 4 << 20
	// watchMatch is how many changed names are read again at once, or matched against a filter.
	watchMatch = 10
	// watchFilter is the longest filter in bytes: the longest name must fit beside it.
	watchFilter = listquery.MaxFilterLength - descriptor.MaxNameBytes - 64
	// watchIdle is how often a watch without changes tells its resume token, so that it does not grow too old.
	watchIdle = 15 * time.Second
)

// watch sends the resources of a collection and then, for ever, what changed. The cursor is taken before the snapshot is read, so a change
// during the snapshot is sent again rather than lost.
func (s *Server) watch(ctx context.Context, req *dbcontrollerv1.WatchRequest, send func(*dbcontrollerv1.WatchResponse) error) error {
	if !s.watches.TryAcquire(1) {
		return fail(connect.CodeResourceExhausted, "TOO_MANY_WATCHES", nil, nil, "%d watches are open already: close one or ask another server", s.cfg.MaxWatches)
	}
	defer s.watches.Release(1)
	w, err := s.newWatch(ctx, req, send)
	if err != nil {
		return err
	}
	if w.cursor, err = w.parseToken(req.GetResumeToken()); err != nil {
		return err
	}
	if w.cursor.IsZero() {
		if err := w.snapshot(ctx, false); err != nil {
			return err
		}
	}
	return s.cfg.Changes.Follow(ctx, feed.Interest{}, func(ctx context.Context) (bool, error) {
		more, err := w.step(ctx)
		if errors.Is(err, feed.ErrCursorLost) {
			return true, w.snapshot(ctx, true)
		}
		return more, err
	})
}

// watcher is one open watch.
type watcher struct {
	s       *Server
	version *descriptor.Version
	// all of the Deployment, or only collection.
	all        bool
	collection descriptor.Collection
	selection  feed.Selection
	filter     string
	query      string // hash of what is watched, part of the token

	send   func(*dbcontrollerv1.WatchResponse) error
	cursor feed.Cursor
	told   time.Time // when the token was sent last

	chunk *dbcontrollerv1.WatchResponse
	bytes int // of chunk
}

func (s *Server) newWatch(ctx context.Context, req *dbcontrollerv1.WatchRequest, send func(*dbcontrollerv1.WatchResponse) error) (*watcher, error) {
	v, err := s.version()
	if err != nil {
		return nil, err
	}
	w := &watcher{s: s, version: v, filter: strings.TrimSpace(req.GetFilter()), chunk: &dbcontrollerv1.WatchResponse{}}
	w.send = func(res *dbcontrollerv1.WatchResponse) error {
		return s.within(ctx, func() error { return send(res) })
	}
	hash := sha256.Sum256([]byte(strings.Join([]string{s.cfg.Service, s.cfg.Region, s.cfg.Version, req.GetCollection(), w.filter}, "\x00")))
	w.query = base64.RawURLEncoding.EncodeToString(hash[:12])
	if req.GetCollection() == "" {
		w.all = true
		if w.filter != "" {
			return nil, invalid("filter", "needs a collection")
		}
		return w, nil
	}
	if w.collection, err = parseCollection(v, req.GetCollection()); err != nil {
		return nil, err
	}
	w.selection = feed.Selection{Type: w.collection.Type.Name, Prefix: w.collection.Prefix}
	if w.filter != "" {
		if len(w.filter) > watchFilter {
			return nil, invalid("filter", "has %d bytes, at most %d are allowed in a watch", len(w.filter), watchFilter)
		}
		// Whatever else may be wrong with the filter, the caller hears it now and not at the first change.
		if _, err := w.matching(ctx, slices.Repeat([]string{"x"}, watchMatch)); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *watcher) token() string { return w.query + "." + w.cursor.Token() }

func (w *watcher) parseToken(token string) (feed.Cursor, error) {
	if token == "" {
		return feed.Cursor{}, nil
	}
	query, cursor, _ := strings.Cut(token, ".")
	c, err := feed.ParseToken(cursor)
	switch {
	case err != nil || c.IsZero():
		return feed.Cursor{}, invalid("resume_token", "is not a token of this service: send back the last one received, or none")
	case query != w.query:
		return feed.Cursor{}, invalid("resume_token", "belongs to another query or another region: send the collection and filter it was received for, or no token")
	}
	return c, nil
}

// snapshot sends what there is. reset tells the caller to forget what it had.
func (w *watcher) snapshot(ctx context.Context, reset bool) error {
	w.chunk.Reset()
	w.bytes = 0
	start, _, err := w.s.cfg.Changes.Now(ctx)
	if err != nil {
		return err
	}
	if reset {
		if err := w.send(&dbcontrollerv1.WatchResponse{Reset_: true}); err != nil {
			return err
		}
	}
	queries := []store.Query{{Prefix: w.collection.Path + "/", Filter: w.filter}}
	if w.all {
		queries = make([]store.Query, len(w.version.Types))
		for i, t := range w.version.Types {
			queries[i].Type = t.Name
		}
	} else {
		queries[0].Type = w.collection.Type.Name
	}
	for _, q := range queries {
		q.PageSize = watchPage
		for {
			page, err := w.s.cfg.Store.List(ctx, q)
			if err != nil {
				return err
			}
			for _, r := range page.Resources {
				if !w.covers(r.Name) {
					continue
				}
				if err := w.set(r); err != nil {
					return err
				}
			}
			if q.PageToken = page.NextPageToken; q.PageToken == "" {
				break
			}
		}
	}
	w.cursor = start
	return w.close()
}

// step sends what one read of the feed finds, as one consistent batch.
func (w *watcher) step(ctx context.Context) (more bool, err error) {
	var held []*store.Resource
	var names []string // of what is not held
	size := 0
	read, err := w.s.cfg.Changes.ReadResources(ctx, w.cursor, w.selection, func(r *store.Resource) error {
		if !w.covers(r.Name) {
			return nil
		}
		size += len(r.Body)
		if r.State != store.Gone && (w.filter != "" || size > watchHeld) {
			names = append(names, r.Name)
		} else {
			held = append(held, r)
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	for _, r := range held {
		if r.State == store.Gone {
			err = w.remove(r.Name)
		} else {
			err = w.set(r)
		}
		if err != nil {
			return false, err
		}
	}
	for len(names) > 0 {
		n := min(len(names), watchMatch)
		if err := w.sendNow(ctx, names[:n]); err != nil {
			return false, err
		}
		names = names[n:]
	}
	w.cursor = read.Cursor
	if w.bytes > 0 || time.Since(w.told) >= watchIdle {
		return read.More, w.close()
	}
	return read.More, nil
}

// sendNow sends the resources of the names as they are now, which is at least as new as the change that was read. One that does not
// match the filter, perhaps no longer, is removed.
func (w *watcher) sendNow(ctx context.Context, names []string) error {
	found, err := w.matching(ctx, names)
	if err != nil {
		return err
	}
	for _, name := range names {
		if r, ok := found[name]; ok {
			err = w.set(r)
		} else {
			err = w.remove(name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// matching returns those of the resources that match the filter. The store judges, so that a watch and a list never disagree.
func (w *watcher) matching(ctx context.Context, names []string) (map[string]*store.Resource, error) {
	found := make(map[string]*store.Resource, len(names))
	if w.filter == "" {
		resources, err := w.s.cfg.Store.BatchGet(ctx, names)
		if err != nil {
			return nil, err
		}
		for _, r := range resources {
			if r != nil {
				found[r.Name] = r
			}
		}
		return found, nil
	}
	for len(names) > 0 {
		filter := "(" + w.filter + ") AND (" + nameIs(names[0])
		n := 1
		for n < len(names) && len(filter)+len(names[n])+32 < listquery.MaxFilterLength {
			filter += " OR " + nameIs(names[n])
			n++
		}
		for q := (store.Query{Type: w.selection.Type, Filter: filter + ")", PageSize: n}); ; {
			page, err := w.s.cfg.Store.List(ctx, q)
			if err != nil {
				return nil, err
			}
			for _, r := range page.Resources {
				found[r.Name] = r
			}
			if q.PageToken = page.NextPageToken; q.PageToken == "" {
				break
			}
		}
		names = names[n:]
	}
	return found, nil
}

// nameIs needs no escapes: there is nothing to escape in a name.
func nameIs(name string) string { return `name = "` + name + `"` }

func (w *watcher) covers(name string) bool {
	n, err := w.version.ParseName(name)
	return err == nil && (w.all || w.collection.Match(n))
}

func (w *watcher) set(r *store.Resource) error {
	return w.add(&dbcontrollerv1.Change{Kind: &dbcontrollerv1.Change_Set{Set: resourceOf(r)}})
}

func (w *watcher) remove(name string) error {
	return w.add(&dbcontrollerv1.Change{Kind: &dbcontrollerv1.Change_Removed{Removed: name}})
}

func (w *watcher) add(c *dbcontrollerv1.Change) error {
	size := proto.Size(c)
	if w.bytes > 0 && w.bytes+size > watchChunk {
		if err := w.flush(); err != nil {
			return err
		}
	}
	w.chunk.Changes = append(w.chunk.Changes, c)
	w.bytes += size
	return nil
}

// close ends a consistent batch.
func (w *watcher) close() error {
	w.chunk.ResumeToken = w.token()
	w.told = time.Now()
	return w.flush()
}

func (w *watcher) flush() error {
	err := w.send(w.chunk)
	w.chunk.Reset()
	w.bytes = 0
	return err
}
