package mixin

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	v1 "github.com/dbcontroller/db-controller/api/dbcontroller/v1"
	"github.com/dbcontroller/db-controller/descriptor"
	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/feed"
)

const (
	// A message of the stream has at most so many bytes of names.
	deletionsChunk = 256 << 10
	// heartbeat is how often a stream without changes tells its token. Who follows one counts on it: see silence.
	heartbeat = 5 * time.Second
)

// everyShard reads without a limit to some shards, whatever the size of the ring.
var everyShard = feed.Range{From: 0, To: math.MaxInt32}

// shardsOf checks a range of shards; none is all.
func (s *Server) shardsOf(from, to int32) (feed.Range, error) {
	if from == 0 && to == 0 {
		return everyShard, nil
	}
	ring := int32(math.MaxInt32)
	if d, ok := s.cfg.Topology.View().Deployment(keyOf(s.self)); ok {
		ring = int32(d.Ring)
	}
	if from < 0 || from >= to || to > ring {
		return feed.Range{}, invalid("shards", "[%d, %d) is no range of the ring: want 0 <= from < to <= %d", from, to, ring)
	}
	return feed.Range{From: from, To: to}, nil
}

// WatchImportedServiceDeletions implements Peer (spec 3.10; F21, F22). It sends what is being deleted and then what is deleted later; a deletion that it has sent
// may come again. Who may have lost sources of references in a failover, that of the requester among them, is told of every deletion.
func (s *Server) WatchImportedServiceDeletions(ctx context.Context, req *v1.WatchImportedServiceDeletionsRequest, emit func(*v1.WatchImportedServiceDeletionsResponse) error) error {
	requester, end, err := s.begin(req.GetCall(), importer, true)
	if err != nil {
		return err
	}
	defer end()
	w := &deletions{s: s, call: req.GetCall(), requester: requester, emit: emit}
	if w.shards, err = s.shardsOf(req.GetShardsFrom(), req.GetShardsTo()); err != nil {
		return err
	}
	hash := sha256.Sum256(fmt.Append(nil, s.self, "\x00", requester, "\x00", req.GetCall().GetVersion(), "\x00", w.shards))
	w.query = base64.RawURLEncoding.EncodeToString(hash[:12])
	if err := w.resume(req.GetResumeToken()); err != nil {
		return err
	}
	return s.cfg.Changes.Follow(ctx, feed.Interest{Owned: true, Shards: w.shards}, w.step)
}

// deletions is one open stream.
type deletions struct {
	s         *Server
	call      *v1.Call
	requester store.Location
	shards    feed.Range
	query     string // hash of what is followed, part of the token
	emit      func(*v1.WatchImportedServiceDeletionsResponse) error

	cursor feed.Cursor // zero: everything that is being deleted now
	epoch  int64
	reset  bool // the next message says so
	told   time.Time
}

// resume continues at a token. One of another stream misses what that did not follow, so it is as good as lost.
func (w *deletions) resume(token string) error {
	if token == "" {
		return nil
	}
	query, cursor, _ := strings.Cut(token, ".")
	c, err := feed.ParseToken(cursor)
	if err != nil || c.IsZero() {
		return invalid("resume_token", "is no token of this stream: send back the last one received, or none")
	}
	if w.reset = query != w.query; !w.reset {
		w.cursor = c
	}
	return nil
}

// step sends what one read finds.
func (w *deletions) step(ctx context.Context) (more bool, err error) {
	// The topology may have changed since: the stream ends when it would be refused today.
	if err := w.s.admit(w.call, importer); err != nil {
		return false, err
	}
	own, spelled, err := w.s.understand(w.call.GetVersion())
	if err != nil {
		return false, err
	}
	var tasks []store.Task
	read, err := w.s.cfg.Core.ReadTasks(ctx, w.cursor, w.shards, func(t store.Task) error {
		if t.State == store.ShadowDeleting {
			tasks = append(tasks, t)
		}
		return nil
	})
	if errors.Is(err, feed.ErrCursorLost) && !w.cursor.IsZero() {
		w.cursor, w.reset = feed.Cursor{}, true
		return true, nil
	}
	if err != nil {
		return false, err
	}
	everything := w.requester == w.s.self
	if len(tasks) > 0 && !everything {
		// Asked after the read: who is not suspect any more has told of all its references by now.
		suspects, err := w.s.cfg.Core.Suspects(ctx, []store.Location{w.requester})
		if err != nil {
			return false, err
		}
		everything = len(suspects) > 0
	}
	w.epoch = read.Cursor.Epoch
	msg := &v1.WatchImportedServiceDeletionsResponse{}
	size := 0
	for _, t := range tasks {
		if !everything {
			concerned, err := w.concerns(ctx, t.Name)
			if err != nil {
				return false, err
			}
			if !concerned {
				continue
			}
		}
		theirs, ok := w.spell(own, spelled, t.Name)
		if !ok {
			continue // what a version cannot say, nobody can refer to in it
		}
		if size > 0 && (size+len(theirs) > deletionsChunk || len(msg.Deleting) == MaxNames) {
			if err := w.send(msg); err != nil {
				return false, err
			}
			msg, size = &v1.WatchImportedServiceDeletionsResponse{}, 0
		}
		msg.Deleting = append(msg.Deleting, &v1.DeletingShadow{Name: theirs, Uuid: t.UUID})
		size += len(theirs)
	}
	w.cursor = read.Cursor
	if size == 0 && !w.reset && time.Since(w.told) < heartbeat {
		return read.More, nil
	}
	msg.ResumeToken = w.query + "." + w.cursor.Token()
	w.told = time.Now()
	return read.More, w.send(msg)
}

// concerns says whether the requester must be told of a deletion: it has, or had, references that it handles itself.
func (w *deletions) concerns(ctx context.Context, name string) (bool, error) {
	shadow, err := w.s.cfg.Core.Shadow(ctx, name)
	if store.CodeOf(err) == store.NotFound {
		return false, nil // complete since
	}
	if err != nil {
		return false, err
	}
	return shadow.State == store.ShadowDeleting && slices.ContainsFunc(shadow.Sources, func(s store.Source) bool {
		return s.Subscriber && s.Location == w.requester
	}), nil
}

func (w *deletions) spell(own, to *descriptor.Version, name string) (string, bool) {
	n, err := own.ParseName(name)
	if err != nil {
		return "", false // of a type that the schema does not have any more
	}
	// The resource is owned here, so its region is ours, whether or not the name says so; and who refers to it knows that this Deployment has it.
	n, ok := n.Translate(to, w.s.cfg.Region)
	return n.Full, ok
}

func (w *deletions) send(msg *v1.WatchImportedServiceDeletionsResponse) error {
	msg.Epoch, msg.Reset_ = w.epoch, w.reset
	w.reset = false
	return w.emit(msg)
}
