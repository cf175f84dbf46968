package monitoring

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
)

const dashboardFiles = "../../charts/db-controller/files/dashboards/*.json"

type (
	datasource struct{ Type, UID string }
	target     struct {
		RefID, Expr string
		Datasource  datasource
	}
	panel struct {
		ID          int
		Type, Title string
		Datasource  *datasource
		GridPos     struct{ X, Y, W, H int }
		Targets     []target
	}
	variable struct {
		Name, Type string
		Query      any // a text, or an object that has one
		Datasource *datasource
	}
	dashboard struct {
		UID, Title, Description string
		Templating              struct{ List []variable }
		Panels                  []panel
	}
)

func readDashboards(t *testing.T) map[string]dashboard {
	t.Helper()
	files, err := filepath.Glob(dashboardFiles)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]dashboard{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		all[strings.TrimSuffix(filepath.Base(f), ".json")] = d
	}
	return all
}

func TestDashboardsAreWhole(t *testing.T) {
	g := NewWithT(t)
	names := known(t)
	all := readDashboards(t)
	g.Expect(all).To(And(HaveLen(4), HaveKey("overview"), HaveKey("pair"), HaveKey("integrity"), HaveKey("controller")))
	for file, d := range all {
		g.Expect(d.UID).To(Equal("dbcontroller-" + file))
		g.Expect(d.Title).To(HavePrefix("db-controller / "))
		g.Expect(d.Description).NotTo(BeEmpty())
		var variables []string
		for _, v := range d.Templating.List {
			variables = append(variables, v.Name)
			if v.Type == "query" {
				g.Expect(v.Datasource).To(HaveField("UID", "${datasource}"), "%s: variable %s", file, v.Name)
				query := v.Query.(map[string]any)["query"].(string)
				g.Expect(metricName.FindAllString(query, -1)).To(ConsistOf(BeKeyOf(names)), "%s: variable %s", file, v.Name)
			}
		}
		g.Expect(variables).To(Equal([]string{"datasource", "db_service", "source_region", "target_region"}), file)

		ids := map[int]string{}
		taken := map[[2]int]string{}
		for _, p := range d.Panels {
			what := file + ": " + p.Title
			g.Expect(ids).NotTo(HaveKey(p.ID), what)
			ids[p.ID] = p.Title
			g.Expect(p.Title).NotTo(BeEmpty(), file)
			for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
				g.Expect(x).To(BeNumerically("<", 24), what)
				for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
					g.Expect(taken[[2]int{x, y}]).To(BeEmpty(), "%s overlaps", what)
					taken[[2]int{x, y}] = p.Title
				}
			}
			if p.Type == "row" {
				continue
			}
			g.Expect(p.Datasource).To(HaveField("UID", "${datasource}"), what)
			g.Expect(p.Targets).NotTo(BeEmpty(), what)
			for _, q := range p.Targets {
				g.Expect(q.Datasource.UID).To(Equal("${datasource}"), what)
				for _, name := range metricName.FindAllString(q.Expr, -1) {
					// Recorded series are for alerts: dashboards also work where the rules are not installed.
					g.Expect(names).To(HaveKey(name), "%s: a metric that is not in docs/reference/metrics.md", what)
				}
			}
		}
	}
}
