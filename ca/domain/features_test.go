package domain

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func TestCommandsWaitForTheLastMember(t *testing.T) {
	w := newWorld(t)
	w.must(w.nodeToken("t1", "n2", time.Hour))
	w.must(w.join("t1", "n2"))
	newer := stage(1, 0, service("accounts", "h1"))
	if r := w.refused(newer, CodeFeature); !strings.Contains(r.Detail, "n1, n2 are behind") {
		t.Errorf("%v", r)
	}
	w.must(level("n1", 2))
	if r := w.refused(newer, CodeFeature); !strings.Contains(r.Detail, "n2 is behind") {
		t.Errorf("%v", r)
	}
	if w.s.Admits(newer) == nil {
		t.Error("the proposer would let it into the log")
	}
	if w.s.Admits(objects(service("accounts", "h1"))) != nil {
		t.Error("an old command waits too")
	}
	w.must(level("n2", 2))
	if w.s.FeatureLevel() != 2 || w.s.Admits(newer) != nil {
		t.Errorf("level %d, %v", w.s.FeatureLevel(), w.s.Admits(newer))
	}
	w.must(newer)
	// It never falls again: the log holds what an older release does not know.
	w.refused(level("n2", 1), CodeFeature)
	w.must(w.nodeToken("t2", "n3", time.Hour))
	w.refused(w.join("t2", "n3"), CodeFeature)
	join := w.join("t2", "n3")
	join.GetJoinMember().GetMember().FeatureLevel = 3
	w.must(join)
	if w.s.FeatureLevel() != 2 {
		t.Errorf("level %d", w.s.FeatureLevel())
	}
}

func TestRemovingTheLaggardRaisesTheLevel(t *testing.T) {
	w := newWorld(t)
	w.must(w.nodeToken("t1", "n2", time.Hour))
	w.must(w.join("t1", "n2"))
	w.must(level("n1", 2))
	w.refused(stage(1, 0, service("accounts", "h1")), CodeFeature)
	w.must(remove("n2", false))
	w.must(stage(1, 0, service("accounts", "h1")))
}

func TestStagedChange(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", 2))
	w.must(tick(epochTime))
	part := func(from, to int) (list []*statev1.Object) {
		for i := from; i < to; i++ {
			list = append(list, service(fmt.Sprintf("s%d", i), "h1"))
		}
		return list
	}
	w.must(stage(1, 0, part(0, 10)...))
	w.unchanged(stage(1, 0, part(0, 10)...))
	w.refused(stage(1, 0, part(0, 9)...), CodeExists)
	if r := w.refused(applyStaged(1, 2), CodeNotFound); !strings.Contains(r.Detail, "part 2 of 2") {
		t.Errorf("%v", r)
	}
	if len(w.s.Objects()) != 0 || w.s.EntryCount() != 0 {
		t.Error("a part means something by itself")
	}
	w.must(stage(1, 1, part(10, 20)...))

	// Another snapshot holds what is put aside.
	if w.restored().stagedBytes != w.s.stagedBytes || w.s.stagedBytes == 0 {
		t.Errorf("%d bytes are put aside", w.s.stagedBytes)
	}
	stale := applyStaged(1, 2)
	stale.IfRevision = w.s.CatalogueRevision() + 1
	w.refused(stale, CodeCAS)
	out := w.must(applyStaged(1, 2))
	if len(out.Changes) != 40 || len(w.s.Objects()) != 20 || w.s.EntryCount() != 20 {
		t.Errorf("%d changes, %d objects", len(out.Changes), len(w.s.Objects()))
	}
	if len(w.s.staged.rows) != 0 || w.s.stagedBytes != 0 {
		t.Error("the parts stay")
	}
	w.refused(applyStaged(1, 2), CodeNotFound)

	// What does not hold together changes nothing; who gives up has it forgotten.
	broken := service("s99", "h1")
	broken.GetService().Path = "/s1"
	w.must(stage(2, 0, service("s50", "h1")))
	w.must(stage(2, 1, broken))
	w.refused(applyStaged(2, 2), CodeInvalid)
	if _, ok := w.s.Object("Service/s50"); ok {
		t.Error("half a change was carried out")
	}
	w.must(applyStaged(2, 0))
	if len(w.s.staged.rows) != 0 || w.s.stagedBytes != 0 {
		t.Error("the parts stay")
	}

	// Who died is forgotten.
	w.must(stage(3, 0, service("s60", "h1")))
	w.must(tick(epochTime.Add(stagedLife)))
	if len(w.s.staged.rows) != 1 {
		t.Error("it was forgotten too early")
	}
	w.must(tick(epochTime.Add(stagedLife + 2*time.Second)))
	if len(w.s.staged.rows) != 0 {
		t.Error("it was not forgotten")
	}
}

// What a member of before would not count in its checksum waits until none is left.
func TestProtocolNeedsItsLevel(t *testing.T) {
	tcp := service("store", "h1")
	tcp.GetService().Protocol = statev1.Protocol_PROTOCOL_TCP
	edge := service("edge", "h1")
	edge.GetService().Port, edge.GetService().Edge = 0, true
	content := service("ledger", "h1")
	content.GetService().Http = &statev1.ServiceHTTP{AnyContent: true}
	imported := func(port uint32) *statev1.Object {
		return &statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: "store.trading.example", Port: port}}}
	}
	for _, test := range []struct {
		cmd  *statev1.Command
		want uint32
	}{
		{objects(service("store", "h1"), imported(0)), 1},
		{objects(service("store", "h1"), tcp), 4},
		{objects(imported(5432)), 4},
		{stage(1, 0, tcp), 4},
		{objects(edge), 5},
		{objects(tcp, edge, binding("b1", viewer, "/x")), 5},
		{objects(tcp, content), 5},
		{objects(content, tcp), 5},
		{stage(1, 0, content), 5},
	} {
		if got := levelOf(test.cmd); got != test.want {
			t.Errorf("level %d, not %d: %v", got, test.want, test.cmd)
		}
	}
}

func TestStagingIsBounded(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", 2))
	large := service("accounts", "h1")
	large.GetService().Hint = strings.Repeat("x", 1<<20)
	refused := 0
	for i := range 20 {
		if out := w.s.Apply(w.next(), stage(1, uint32(i), large)); out.Refused != nil {
			if refused++; out.Refused.Code != CodeLimit {
				t.Fatal(out.Refused)
			}
		}
	}
	if refused != 5 || w.s.stagedBytes > maxStaged {
		t.Errorf("%d refused, %d bytes are put aside", refused, w.s.stagedBytes)
	}
	for _, c := range []*statev1.StageObjects{{}, {Id: bytes.Repeat([]byte{1}, stageIDSize), Part: maxParts}, {Id: bytes.Repeat([]byte{1}, stageIDSize)}} {
		if out := w.s.Apply(w.next(), &statev1.Command{Body: &statev1.Command_StageObjects{StageObjects: c}}); out.Refused == nil || out.Refused.Code != CodeInvalid {
			t.Errorf("%v: %v", c, out.Refused)
		}
	}
}

// One Tick moves the agreed time by a bounded step; a leader that has to make up for a long
// pause sends several. A cluster with a member of the release before decides as that did.
func TestTickMovesTimeByABoundedStep(t *testing.T) {
	w := newWorld(t)
	far := epochTime.Add(48 * time.Hour)
	w.must(level("n1", 4))
	w.must(tick(far))
	if !w.s.Now().Equal(far) {
		t.Errorf("control: at level 4 the time is %v", w.s.Now())
	}
	w.must(level("n1", 5))
	w.must(tick(far.Add(24 * time.Hour)))
	if got := w.s.Now().Sub(far); got != MaxTickStep {
		t.Errorf("one Tick moved the time by %v", got)
	}
	w.must(tick(far.Add(24 * time.Hour)))
	if got := w.s.Now().Sub(far); got != 2*MaxTickStep {
		t.Errorf("two Ticks moved the time by %v", got)
	}
	w.must(tick(far.Add(2*MaxTickStep + time.Second)))
	if got := w.s.Now().Sub(far); got != 2*MaxTickStep+time.Second {
		t.Errorf("a small step moved the time to %v", got)
	}
}
