// Package monitoring tests what people watch db-controller with: the rules and dashboards of the chart, and the runbooks.
//
//	rules_test.go       every alert fires when it must and is silent when it must (promtool), and has a runbook
//	dashboards_test.go  the dashboards are whole, and name only metrics that there are
//	live_test.go        a real Prometheus scrapes a running demo: every query and rule works, and finds data
//
// The programs prometheus and promtool are those of the Debian package prometheus, which "make deps" installs. Without them the tests that need them are skipped,
// loudly, unless DBC_REQUIRE_PROMETHEUS is set, as "make test" does: then they fail.
package monitoring
