package row_test

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/dbcontroller/db-controller/store"
	"github.com/dbcontroller/db-controller/store/row"
)

// tuple is a row as PostgreSQL would send it.
func tuple(t testing.TB, name, owner string, regions []string, updated time.Time) []byte {
	t.Helper()
	m := pgtype.NewMap()
	var values [][]byte
	add := func(oid uint32, v any) {
		b, err := m.Encode(oid, pgtype.BinaryFormatCode, v, nil)
		if err != nil {
			t.Fatal(err)
		}
		values = append(values, b)
	}
	add(pgtype.TextOID, name)
	add(pgtype.TextOID, "Book")
	add(pgtype.UUIDOID, [16]byte{1, 2, 3})
	add(pgtype.Int8OID, int64(3))
	add(pgtype.Int8OID, int64(7))
	add(pgtype.Int8OID, int64(1))
	add(pgtype.Int4OID, int32(42))
	add(pgtype.TextOID, owner)
	add(pgtype.TextArrayOID, regions)
	add(pgtype.Int2OID, int16(2))
	add(pgtype.BoolOID, false)
	add(pgtype.TimestamptzOID, updated)
	add(pgtype.TimestamptzOID, updated)
	values = append(values, nil)
	add(pgtype.JSONBOID, []byte(`{}`))
	values = append(values, nil)
	return row.Append(nil, values)
}

func TestWalkReadsWhatAppendWrote(t *testing.T) {
	at := time.Date(2026, 2, 3, 4, 5, 6, 7000, time.UTC)
	data := append(tuple(t, "shelves/a", "eu", []string{"eu"}, at), tuple(t, "shelves/b", "us", []string{}, at)...)
	var names []string
	err := row.Walk(data, func(x *row.Tuple) error {
		names = append(names, x.Name())
		if x.Version() != (store.Version{Epoch: 3, Number: 7}) || x.Shard() != 42 || !x.Removal() || !x.UpdateTime().Equal(at) {
			t.Errorf("%s: version %v, shard %d, removal %v, updated %v", x.Name(), x.Version(), x.Shard(), x.Removal(), x.UpdateTime())
		}
		return nil
	})
	if err != nil || len(names) != 2 || names[0] != "shelves/a" || names[1] != "shelves/b" {
		t.Errorf("walked %v, %v", names, err)
	}
}

func TestWalkRefusesWhatIsNoTuple(t *testing.T) {
	good := tuple(t, "shelves/a", "eu", []string{}, time.Now())
	long := append([]byte(nil), good...)
	binary.BigEndian.PutUint32(long[2:], 1<<30)
	null := append([]byte(nil), good...)
	binary.BigEndian.PutUint32(null[2:], 0xffffffff)
	for name, data := range map[string][]byte{
		"one byte": {0}, "too few fields": {0, 15, 0, 0}, "cut": good[:len(good)-1], "rest": append(append([]byte(nil), good...), 0),
		"length beyond the end": long, "no name": null,
	} {
		if err := row.Walk(data, func(*row.Tuple) error { return nil }); !errors.Is(err, row.ErrMalformed) {
			t.Errorf("%s: Walk gave %v, want ErrMalformed", name, err)
		}
	}
}

func TestTransposeMakesArraysThatPostgreSQLReads(t *testing.T) {
	at := time.Now().UTC().Truncate(time.Microsecond)
	data := append(tuple(t, "shelves/a", "eu", []string{`q"uo\te`, "", "us"}, at), tuple(t, "shelves/b", "eu", []string{}, at)...)
	columns, formats := row.Transpose(data, 2)
	if len(columns) != 16 || len(formats) != 16 {
		t.Fatalf("%d columns, %d formats", len(columns), len(formats))
	}
	m := pgtype.NewMap()
	var names, regions []string
	var deleted []*time.Time
	for _, c := range []struct {
		oid uint32
		at  int
		to  any
	}{{pgtype.TextArrayOID, 0, &names}, {pgtype.TextArrayOID, 8, &regions}, {pgtype.TimestamptzArrayOID, 13, &deleted}} {
		if err := m.Scan(c.oid, pgtype.BinaryFormatCode, columns[c.at], c.to); err != nil {
			t.Fatalf("column %d: %v", c.at, err)
		}
	}
	if names[1] != "shelves/b" || deleted[0] != nil {
		t.Errorf("names %v, deleted %v", names, deleted)
	}
	var back []string
	if err := m.Scan(pgtype.TextArrayOID, pgtype.TextFormatCode, []byte(regions[0]), &back); err != nil || len(back) != 3 || back[0] != `q"uo\te` || back[1] != "" {
		t.Errorf("regions %q are read as %q, %v", regions[0], back, err)
	}
	if regions[1] != "{}" {
		t.Errorf("no regions are written as %q", regions[1])
	}
}

func FuzzWalk(f *testing.F) {
	f.Add(tuple(f, "shelves/a", "eu", []string{"eu", "us"}, time.Now()))
	f.Add([]byte{0, 16, 0, 0, 0, 1, 'x'})
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		if err := row.Walk(data, func(x *row.Tuple) error {
			n++
			_, _, _, _ = x.Name(), x.Version(), x.Owner(), x.UpdateTime()
			return nil
		}); err == nil {
			row.Transpose(data, n)
		}
	})
}
