package demo

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/config/samples"
	"github.com/dbcontroller/db-controller/descriptor"
)

// maxLine is what the line of a resource may have; a request may have 4 MiB.
const maxLine = 3 << 20

// input are the resources to load: their lines, and the references between them.
type input struct {
	schema  *descriptor.Version
	lines   [][]byte // by node
	numbers []int    // of the lines, by node
	graph
	index map[string]int32
}

// sampleSchema is the schema of the service that the regions serve.
func sampleSchema() (*descriptor.Version, error) {
	var d v1alpha1.ServiceDescriptor
	if err := yaml.UnmarshalStrict(samples.Packages, &d); err != nil {
		return nil, err
	}
	s, err := descriptor.Compile(&d.Spec)
	if err != nil {
		return nil, err
	}
	return s.Version(apiVersion), nil
}

// parseInput reads one JSON object per line. It keeps data.
func parseInput(schema *descriptor.Version, data []byte) (*input, error) {
	in := &input{schema: schema, index: map[string]int32{}}
	number := 0
	for line := range bytes.Lines(data) {
		number++
		if line = bytes.TrimSpace(line); len(line) > 0 {
			in.lines, in.numbers = append(in.lines, line), append(in.numbers, number)
		}
	}
	parsed := make([]parsedLine, len(in.lines))
	var workers errgroup.Group
	every := runtime.GOMAXPROCS(0)
	for first := range every {
		workers.Go(func() error {
			for i := first; i < len(parsed); i += every {
				var err error
				if parsed[i], err = parseLine(schema, in.lines[i]); err != nil {
					return lineError{in.numbers[i], err}
				}
			}
			return nil
		})
	}
	if err := workers.Wait(); err != nil {
		return nil, err
	}
	for i := range parsed {
		p := &parsed[i]
		if first, twice := in.index[p.name.Full]; twice {
			return nil, lineError{in.numbers[i], fmt.Errorf("name: line %d is %s, too", in.numbers[first], p.name.Full)}
		}
		in.index[p.name.Full] = int32(i)
	}
	for i := range parsed {
		in.add(int32(i), &parsed[i], parsed)
	}
	return in, nil
}

// lineError says where the input is wrong.
type lineError struct {
	line int
	err  error
}

func (e lineError) Error() string { return fmt.Sprintf("line %d: %v", e.line, e.err) }
func (e lineError) Unwrap() error { return e.err }

type parsedLine struct {
	name   descriptor.Name
	refs   []descriptor.Ref
	policy *descriptor.Policy // of a policy holder
}

func parseLine(schema *descriptor.Version, line []byte) (p parsedLine, err error) {
	if len(line) > maxLine {
		return p, fmt.Errorf("has %d bytes, it may have %d", len(line), maxLine)
	}
	var head struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(line, &head); err != nil {
		return p, fmt.Errorf("is not a JSON object: %w", err)
	}
	if p.name, err = schema.ParseName(head.Name); err != nil {
		return p, fmt.Errorf("name: %w", err)
	}
	if p.name.Type.IsPolicyHolder() {
		p.policy, _ = p.name.Type.PolicyOf(line) // its faults are the server's to report
	}
	p.refs, err = p.name.Type.References(line)
	return p, err
}

// add makes the node of a line. Lines are added in their order.
func (in *input) add(i int32, p *parsedLine, all []parsedLine) {
	n := node{name: p.name.Full, governs: p.name.Type.IsPolicyHolder(), bytes: len(in.lines[i]), first: len(in.edges)}
	n.holder = p.name.HolderName()
	if p.policy != nil {
		n.controls = p.policy.DefaultControlRegion()
	}
	policy := in.schema.Service.Policy
	if n.holder != "" {
		policy = nil
		if h, ok := in.index[n.holder]; ok {
			policy = all[h].policy
			in.edges = append(in.edges, edge{from: i, to: h})
		}
	}
	n.owner, _ = descriptor.OwningRegion(p.name, policy) // of a holder that is not in the input nothing is known
	in.nodes = append(in.nodes, n)
	if p.name.Type.OptOutConstraints {
		return
	}
	if parent, ok := in.index[p.name.Parent()]; ok && enforced(all[parent].name.Type, p.name.Type.OnParentDeleted) {
		in.edges = append(in.edges, edge{from: i, to: parent, behavior: p.name.Type.OnParentDeleted})
	}
	for _, r := range p.refs {
		if to, ok := in.index[r.Name]; ok && r.TargetService == in.schema.Service.Name && enforced(all[to].name.Type, r.OnTargetDeleted) {
			in.edges = append(in.edges, edge{i, to, r.FieldPath, r.OnTargetDeleted})
		}
	}
}

// enforced says whether a target must exist when it is referred to.
func enforced(target *descriptor.Type, behavior v1alpha1.DeleteBehavior) bool {
	return !target.OptOutConstraints && behavior != v1alpha1.DeleteAllowDangling
}

// about makes the failure of a transaction one of the input: of its line if the server has named the write, or of all its lines.
func (in *input) about(rows []int32, err error) error {
	if m := namedWrite.FindStringSubmatch(err.Error()); m != nil {
		if i, _ := strconv.Atoi(m[1]); i < len(rows) {
			return lineError{in.numbers[rows[i]], err}
		}
	}
	first, last := in.numbers[rows[0]], in.numbers[rows[0]]
	for _, n := range rows {
		first, last = min(first, in.numbers[n]), max(last, in.numbers[n])
	}
	if first == last {
		return lineError{first, err}
	}
	return fmt.Errorf("%d of the lines %d to %d: %w", len(rows), first, last, err)
}

// namedWrite is how the server names one write of a batch.
var namedWrite = regexp.MustCompile(`writes\[(\d+)\]`)

// line returns the line of a node, without some of its references.
func (in *input) line(n int32, without []int) ([]byte, error) {
	if len(without) == 0 {
		return in.lines[n], nil
	}
	var object map[string]any
	d := json.NewDecoder(bytes.NewReader(in.lines[n]))
	d.UseNumber() // no number changes
	if err := d.Decode(&object); err != nil {
		return nil, lineError{in.numbers[n], err}
	}
	for _, e := range slices.Backward(without) { // from the end of a list to its beginning, so that its positions hold
		remove(object, in.edges[e].path)
	}
	return json.Marshal(object)
}

// remove removes what is at a path that descriptor.Type.References has found: a field, or an item of a list.
func remove(value any, path string) {
	object := value.(map[string]any)
	head, rest, deeper := strings.Cut(path, ".")
	name, index, isItem := strings.Cut(strings.TrimSuffix(head, "]"), "[")
	if !isItem {
		if deeper {
			remove(object[name], rest)
		} else {
			delete(object, name)
		}
		return
	}
	items := object[name].([]any)
	i, _ := strconv.Atoi(index) // it was made of a number
	if deeper {
		remove(items[i], rest)
	} else {
		object[name] = slices.Delete(items, i, i+1)
	}
}
