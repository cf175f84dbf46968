package cache

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"time"

	"github.com/dbcontroller/db-controller/store"
)

// First bytes of what lies under a name's key.
const (
	leaseMark = 'L'
	entryMark = 'E'
)

var errMalformed = errors.New("malformed cache entry")

// Flags of an entry.
const (
	hasDeleteTime = 1 << iota
	blocksDeletion
	hasMeta
)

// appendEntry writes r as it was read at that time.
func appendEntry(b []byte, r *store.Resource, at time.Time) ([]byte, error) {
	b = append(b, entryMark)
	b = binary.AppendVarint(b, at.UnixMicro())
	return appendResource(b, r)
}

func appendResource(b []byte, r *store.Resource) ([]byte, error) {
	b = appendText(b, r.Name, r.Type, r.UUID, r.OwningRegion)
	for _, n := range []int64{r.Version.Epoch, r.Version.Number, r.Generation, int64(r.Shard), int64(r.State), r.CreateTime.UnixMicro(), r.UpdateTime.UnixMicro()} {
		b = binary.AppendVarint(b, n)
	}
	flags := byte(0)
	if !r.DeleteTime.IsZero() {
		flags |= hasDeleteTime
	}
	if r.BlockDeletion {
		flags |= blocksDeletion
	}
	m := &r.Meta
	if len(m.Labels)+len(m.Annotations)+len(m.Tags)+len(m.OwnerReferences) > 0 {
		flags |= hasMeta
	}
	b = append(b, flags)
	if flags&hasDeleteTime != 0 {
		b = binary.AppendVarint(b, r.DeleteTime.UnixMicro())
	}
	b = binary.AppendUvarint(b, uint64(len(r.Regions)))
	b = appendText(b, r.Regions...)
	if flags&hasMeta != 0 {
		meta, err := json.Marshal(m)
		if err != nil {
			return nil, err
		}
		b = appendText(b, string(meta))
	}
	return appendText(b, string(r.Body)), nil
}

func appendText(b []byte, texts ...string) []byte {
	for _, t := range texts {
		b = binary.AppendUvarint(b, uint64(len(t)))
		b = append(b, t...)
	}
	return b
}

// readEntry reads what appendEntry wrote.
func readEntry(b []byte) (r *store.Resource, at time.Time, err error) {
	d := decoder{rest: b}
	if d.byte() != entryMark {
		return nil, at, errMalformed
	}
	at = d.time()
	r = d.resource()
	if d.bad || len(d.rest) > 0 {
		return nil, at, errMalformed
	}
	return r, at, nil
}

// A page is: the tag under which it was read, when that was, the token of the next page, and its resources.
func appendPage(b []byte, tag string, p *store.Page, at time.Time) (_ []byte, err error) {
	b = appendText(b, tag)
	b = binary.AppendVarint(b, at.UnixMicro())
	b = appendText(b, p.NextPageToken)
	b = binary.AppendUvarint(b, uint64(len(p.Resources)))
	for _, r := range p.Resources {
		if b, err = appendResource(b, r); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// readPage reads what appendPage wrote; a page with another tag is nil.
func readPage(b []byte, tag string) (p *store.Page, at time.Time, err error) {
	d := decoder{rest: b}
	if d.text() != tag {
		if d.bad {
			return nil, at, errMalformed
		}
		return nil, at, nil
	}
	at = d.time()
	p = &store.Page{NextPageToken: d.text()}
	for n := d.count(); n > 0 && !d.bad; n-- {
		p.Resources = append(p.Resources, d.resource())
	}
	if d.bad || len(d.rest) > 0 {
		return nil, at, errMalformed
	}
	return p, at, nil
}

// decoder reads from rest; what does not fit makes it bad for good.
type decoder struct {
	rest []byte
	bad  bool
}

func (d *decoder) byte() byte {
	if len(d.rest) == 0 {
		d.bad = true
		return 0
	}
	c := d.rest[0]
	d.rest = d.rest[1:]
	return c
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.rest)
	if n <= 0 {
		d.bad, d.rest = true, nil
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

// count is a number of things that take at least a byte each.
func (d *decoder) count() uint64 {
	v, n := binary.Uvarint(d.rest)
	if n <= 0 || v > uint64(len(d.rest)-n) {
		d.bad, d.rest = true, nil
		return 0
	}
	d.rest = d.rest[n:]
	return v
}

func (d *decoder) bytes() []byte {
	n := d.count()
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) text() string    { return string(d.bytes()) }
func (d *decoder) time() time.Time { return time.UnixMicro(d.int()) }

func (d *decoder) resource() *store.Resource {
	r := &store.Resource{Name: d.text(), Type: d.text(), UUID: d.text(), OwningRegion: d.text()}
	r.Version = store.Version{Epoch: d.int(), Number: d.int()}
	r.Generation, r.Shard, r.State = d.int(), int32(d.int()), store.State(d.int())
	r.CreateTime, r.UpdateTime = d.time(), d.time()
	flags := d.byte()
	if flags&hasDeleteTime != 0 {
		r.DeleteTime = d.time()
	}
	r.BlockDeletion = flags&blocksDeletion != 0
	r.Regions = make([]string, d.count())
	for i := range r.Regions {
		r.Regions[i] = d.text()
	}
	if flags&hasMeta != 0 && json.Unmarshal(d.bytes(), &r.Meta) != nil {
		d.bad = true
	}
	r.Body = d.bytes() // of the reply, which nobody else holds
	return r
}
