// Package row is the layout in which rows travel from one region's PostgreSQL to another's: binary COPY tuples, never decoded on the way.
//
// A tuple is what COPY ... (FORMAT binary) calls one: an int16 count of fields, then for each an int32 length (-1 for NULL) and that many bytes.
// The source builds them from the raw values of a SELECT of Columns; the destination hands them to COPY FROM. Between the two, Walk
// checks the framing of what came over the network and lets the few fields be read that decide something.
package row

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/dbcontroller/db-controller/store"
)

// Layout is the version of the column list. Two servers with different layouts refuse each other.
const Layout = 1

// Columns of a tuple, in order, as they are named in the resources table.
const Columns = "name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, state, block_deletion, create_time, update_time, delete_time, meta, body"

// Wire is the SELECT list for Columns, from Source, as one region should hold them: a row that region must not hold (deleted, or moved away by
// policy) is a tombstone without content. WireHeld is the same for rows that are known to be held. jsonb_send forces the binary form, which the
// driver would not choose by itself.
const (
	Wire = `name, type, uuid, epoch, resource_version, generation, shard, owning_region,
	CASE WHEN held THEN regions ELSE '{}' END, CASE WHEN held THEN state ELSE 2::int2 END, block_deletion, create_time, update_time,
	CASE WHEN held THEN delete_time ELSE coalesce(delete_time, update_time) END,
	CASE WHEN held THEN jsonb_send(meta) ELSE jsonb_send('{}') END, CASE WHEN held THEN jsonb_send(body) END`
	WireHeld = `name, type, uuid, epoch, resource_version, generation, shard, owning_region, regions, state, block_deletion, create_time, update_time,
	delete_time, jsonb_send(meta), jsonb_send(body)`
)

// Held is the condition on a row that the region in $1 should hold it, and Concerns that it should hold it or hear of its removal. $1 is RegionKeys.
const (
	Held     = `(state <> 2 AND regions && $1)`
	Concerns = `(regions && $1 OR left_regions && $1)`
)

// Source is the table as Wire reads it, limited by the rest of a SELECT from WHERE on, which must keep the planner from merging the subquery (by a limit
// or OFFSET 0): Held is then evaluated once a row.
func Source(rest string) string {
	return "(SELECT *, " + Held + " AS held FROM resources " + rest + ") r"
}

// Positions of the fields that are read on the way.
const (
	fieldName       = 0
	fieldEpoch      = 3
	fieldVersion    = 4
	fieldShard      = 6
	fieldOwner      = 7
	fieldRegions    = 8
	fieldState      = 9
	fieldUpdateTime = 12
	numFields       = 16
)

// RegionKeys is the parameter $1 of Wire for a region.
func RegionKeys(region string) []string { return []string{region, store.EveryRegion} }

// Append adds one tuple made of raw binary values, nil meaning NULL, to buf. values beyond the layout are ignored.
func Append(buf []byte, values [][]byte) []byte {
	buf = binary.BigEndian.AppendUint16(buf, numFields)
	for _, v := range values[:numFields] {
		if v == nil {
			buf = append(buf, 0xff, 0xff, 0xff, 0xff)
			continue
		}
		buf = binary.BigEndian.AppendUint32(buf, uint32(len(v)))
		buf = append(buf, v...)
	}
	return buf
}

// Tuple is one row inside a buffer of tuples.
type Tuple struct {
	raw    []byte
	fields [numFields][]byte
}

// Raw returns the bytes of the tuple.
func (t *Tuple) Raw() []byte { return t.raw }

// Name of the resource.
func (t *Tuple) Name() string { return string(t.fields[fieldName]) }

// Version of the resource.
func (t *Tuple) Version() store.Version {
	return store.Version{Epoch: t.int64(fieldEpoch), Number: t.int64(fieldVersion)}
}

// Owner is the owning region that the tuple claims.
func (t *Tuple) Owner() string { return string(t.fields[fieldOwner]) }

// OwnedBy says whether the tuple claims region as its owner, without allocating.
func (t *Tuple) OwnedBy(region string) bool { return string(t.fields[fieldOwner]) == region }

// Shard of the name.
func (t *Tuple) Shard() int32 { return int32(binary.BigEndian.Uint32(t.fields[fieldShard])) }

// Removal says whether the row is gone for the region that receives it.
func (t *Tuple) Removal() bool {
	return binary.BigEndian.Uint16(t.fields[fieldState]) == uint16(store.Gone)
}

// UpdateTime is the source's clock at the write.
func (t *Tuple) UpdateTime() time.Time {
	return pgEpoch.Add(time.Duration(t.int64(fieldUpdateTime)) * time.Microsecond)
}

func (t *Tuple) int64(field int) int64 {
	return int64(binary.BigEndian.Uint64(t.fields[field]))
}

// pgEpoch is where PostgreSQL's binary timestamps start.
var pgEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// ErrMalformed means that a peer sent bytes that are not tuples of this layout.
var ErrMalformed = errors.New("malformed rows")

// widths of the fixed-size fields that accessors read; 0 is variable.
var widths = [numFields]int{fieldEpoch: 8, fieldVersion: 8, fieldShard: 4, fieldState: 2, fieldUpdateTime: 8}

// Walk calls visit for each tuple in data. The Tuple is valid during the call only. It returns ErrMalformed for bytes that are not whole
// tuples, after visiting those before them.
func Walk(data []byte, visit func(*Tuple) error) error {
	var t Tuple
	for len(data) > 0 {
		rest, err := t.parse(data)
		if err != nil {
			return err
		}
		if err := visit(&t); err != nil {
			return err
		}
		data = rest
	}
	return nil
}

func (t *Tuple) parse(data []byte) (rest []byte, err error) {
	if len(data) < 2 || binary.BigEndian.Uint16(data) != numFields {
		return nil, fmt.Errorf("%w: not a tuple of %d fields", ErrMalformed, numFields)
	}
	at := 2
	for i := range t.fields {
		if len(data)-at < 4 {
			return nil, fmt.Errorf("%w: cut in field %d", ErrMalformed, i)
		}
		n := int(int32(binary.BigEndian.Uint32(data[at:])))
		at += 4
		if n < 0 {
			if n != -1 || i <= fieldUpdateTime {
				return nil, fmt.Errorf("%w: field %d has length %d", ErrMalformed, i, n)
			}
			t.fields[i] = nil
			continue
		}
		if n > len(data)-at || widths[i] != 0 && n != widths[i] {
			return nil, fmt.Errorf("%w: field %d has length %d", ErrMalformed, i, n)
		}
		t.fields[i] = data[at : at+n : at+n]
		at += n
	}
	t.raw = data[:at:at]
	return data[at:], nil
}

// fieldTypes are the types of the fields, as PostgreSQL's object ids.
var fieldTypes = [numFields]uint32{pgtype.TextOID, pgtype.TextOID, pgtype.UUIDOID, pgtype.Int8OID, pgtype.Int8OID, pgtype.Int8OID, pgtype.Int4OID, pgtype.TextOID,
	pgtype.TextOID, pgtype.Int2OID, pgtype.BoolOID, pgtype.TimestamptzOID, pgtype.TimestamptzOID, pgtype.TimestamptzOID, pgtype.JSONBOID, pgtype.JSONBOID}

// Transpose returns the fields of n tuples, which Walk has found well-formed, as binary arrays, one for each column, for a statement that unnests them.
// Only regions change their form: an array of arrays would be flattened, so they become text literals.
func Transpose(data []byte, n int) (columns [][]byte, formats []int16) {
	columns, formats = make([][]byte, numFields, numFields+4), make([]int16, numFields, numFields+4)
	for i := range columns {
		columns[i] = make([]byte, 0, 20+max(len(data)/numFields, 16*n))
		columns[i] = binary.BigEndian.AppendUint32(columns[i], 1) // dimensions
		columns[i] = binary.BigEndian.AppendUint32(columns[i], 1) // there may be NULLs
		columns[i] = binary.BigEndian.AppendUint32(columns[i], fieldTypes[i])
		columns[i] = binary.BigEndian.AppendUint32(columns[i], uint32(n))
		columns[i] = binary.BigEndian.AppendUint32(columns[i], 1) // lower bound
		formats[i] = 1
	}
	var literal []byte
	_ = Walk(data, func(t *Tuple) error {
		for i, v := range t.fields {
			if v == nil {
				columns[i] = append(columns[i], 0xff, 0xff, 0xff, 0xff)
				continue
			}
			if i == fieldRegions {
				literal = appendLiteral(literal[:0], v)
				v = literal
			}
			columns[i] = binary.BigEndian.AppendUint32(columns[i], uint32(len(v)))
			columns[i] = append(columns[i], v...)
		}
		return nil
	})
	return columns, formats
}

// appendLiteral turns a binary text[] into its text form. An array that is malformed becomes a literal that PostgreSQL refuses, like any other poison.
func appendLiteral(buf, array []byte) []byte {
	if len(array) == 12 { // no dimension: empty
		return append(buf, "{}"...)
	}
	buf = append(buf, '{')
	for rest := array[min(20, len(array)):]; len(rest) > 0; {
		if len(rest) < 4 {
			return buf
		}
		n := int(int32(binary.BigEndian.Uint32(rest)))
		rest = rest[4:]
		if n < 0 || n > len(rest) {
			return buf
		}
		if len(buf) > 1 {
			buf = append(buf, ',')
		}
		buf = append(buf, '"')
		for _, c := range rest[:n] {
			if c == '"' || c == '\\' {
				buf = append(buf, '\\')
			}
			buf = append(buf, c)
		}
		buf = append(buf, '"')
		rest = rest[n:]
	}
	return append(buf, '}')
}
