package node_test

import (
	"bufio"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
)

// The states are compared again when the log has grown, and not before.
func TestComparedAsTheLogGrows(t *testing.T) {
	t.Parallel()
	ca1 := catest.Start(t, catest.Options{})
	ca1.Stop()
	ca1.Config().CompareEvery(100_000) // not again here
	ca1.Restart()
	ca1.WaitReady()
	ca2 := ca1.Join("ca-2", "dc1")
	var first float64
	n := 0
	write := func(entries int) {
		for range entries {
			n++
			resp, err := ca1.Admin().ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{{
				Action: &statev1.EntryChange_Create{Create: &statev1.Entry{
					Id: fmt.Sprintf("entry/e%d", n), Path: "/job", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"},
				}},
			}}})
			if err != nil || resp.GetResults()[0].GetCode() != 0 {
				t.Fatal(resp, err)
			}
		}
	}
	for try := 1; ; try++ {
		term := ca2.Node().Term()
		first = compared(t, ca2)
		write(60)
		time.Sleep(1100 * time.Millisecond) // a leader looks every second
		again := compared(t, ca2)
		if again == first {
			break
		}
		if ca2.Node().Term() == term || try == 5 { // after an election the new leader compares at once
			t.Fatalf("compared at %v, and again at %v", first, again)
		}
	}

	ca1.Stop()
	ca2.Stop()
	ca1.Config().CompareEvery(50)
	ca2.Config().CompareEvery(50) // whoever leads then
	ca1.Restart()
	ca2.Restart()
	ca1.WaitReady()
	ca2.WaitReady()
	var begun float64
	eventually(t, "a new leader compares", 20*time.Second, func() error {
		if begun = compared(t, ca2); begun > first {
			return nil
		}
		return fmt.Errorf("last at %v", begun)
	})
	write(60)
	eventually(t, "compared after 50 entries", 20*time.Second, func() error {
		if at := compared(t, ca2); at >= begun+50 {
			return nil
		}
		return fmt.Errorf("last at %v", begun)
	})
}

// compared reads the metric.
func compared(t *testing.T, c *catest.CA) (index float64) {
	t.Helper()
	resp, err := http.Get("http://" + c.Node().AdminAddr() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, is := strings.CutPrefix(lines.Text(), "entente_ca_compared_index "); is {
			if _, err := fmt.Sscan(value, &index); err != nil {
				t.Fatal(err)
			}
		}
	}
	return index
}
