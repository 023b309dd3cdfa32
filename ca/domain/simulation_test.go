package domain

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// choose gives a number from 0 below n.
type choose func(n int) int

// random is a command that may or may not make sense now. Names are few, so that
// commands meet.
func (w *world) random(choose choose) *statev1.Command {
	s := w.s
	name := func(prefix string, n int) string { return prefix + strconv.Itoa(1+choose(n)) }
	tokenID := name("t", 12)
	authority := func() string {
		if all := s.Authorities(); len(all) > 0 && choose(20) > 0 {
			return all[choose(len(all))].GetId()
		}
		return keyID("none")
	}
	var cmd *statev1.Command
	switch choose(23) {
	case 0, 1:
		cmd = tick(s.Now().Add(time.Duration(choose(3600)-600)*time.Second), s.Now().Add(time.Minute))
		if choose(40) == 0 {
			cmd = tick(s.Now().Add(40 * time.Hour))
		}
	case 2:
		cmd = w.agentToken(tokenID, name("h", 4), time.Duration(1+choose(7200))*time.Second)
	case 3:
		cmd = w.nodeToken(tokenID, name("n", 4), time.Duration(1+choose(7200))*time.Second)
		cmd.GetCreateToken().GetToken().GetNode().Voter = choose(3) > 0
	case 4, 5:
		cmd = w.attest(tokenID, keyID(name("agent", 6)))
	case 6:
		cmd = w.join(tokenID, name("n", 4))
	case 7:
		cmd = remove(name("n", 4), choose(3) == 0)
		if choose(2) > 0 {
			m := member(name("n", 4))
			cmd = &statev1.Command{Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{
				Id: m.GetId(), RaftAddress: fmt.Sprintf("127.2.0.1:%d", 1+choose(4)), ApiAddress: m.GetApiAddress(),
				FeatureLevel: uint32(choose(FeatureLevel + 3)),
			}}}
		}
	case 8:
		a := w.authority(name("n", 4), name("k", 40))
		if choose(4) == 0 {
			a.Use, a.Certificate = statev1.KeyUse_KEY_USE_JWT, nil
		}
		cmd = prepare(a)
	case 9:
		cmd = ready(authority())
	case 10:
		cmd = activate(authority())
	case 11, 12:
		o := service(name("s", 5), name("h", 4), name("h", 4))
		o.GetService().X509SvidSeconds = uint32(choose(3)) * 30
		if choose(3) == 0 {
			o.GetService().ExportTo = []string{name("p", 3) + ".example"}
		}
		cmd = objects(o)
		if n := choose(4); n > 0 {
			cmd.GetApplyObjects().Upserts = append(cmd.GetApplyObjects().Upserts, gateway(name("gw-", 2), n, name("h", 4)))
		}
		if choose(4) == 0 {
			cmd.IfRevision = s.CatalogueRevision() - uint64(choose(2))
		}
	case 13:
		cmd = objects(relationship(name("p", 3) + ".example"))
	case 14:
		cmd = deletes([]string{"Service/" + name("s", 5), "Gateway/" + name("gw-", 2), "Relationship/" + name("p", 3) + ".example"}[choose(3)])
	case 15:
		td := name("p", 3) + ".example"
		have, _ := s.ForeignBundle(td)
		cmd = foreign(td, fmt.Sprint(choose(3)), max(have.GetSequence(), 2)+2-uint64(choose(5)))
	case 17:
		switch id := authority(); choose(5) {
		case 0, 1:
			cmd = taint(id)
		case 2:
			cmd = drained(id, "somebody")
		default:
			cmd = revoke(id, choose(3) == 0)
		}
	case 18:
		cmd = ban(name("h", 4))
		if choose(4) == 0 {
			cmd = evict(name("h", 4))
		}
		if choose(4) == 0 { // what some node remembers, true or not
			who := &statev1.Agent{Name: name("h", 4), Datacenter: "dc1", KeyId: keyID(name("a", 9)), Generation: uint64(choose(int(s.Applied()) + 3))}
			if have, ok := s.Agent(who.GetName()); ok && choose(2) == 0 {
				who = have
			}
			cmd = mergeBans(choose(3) == 0, who)
		}
	case 19:
		cmd = revokeToken(tokenID)
	case 20:
		e := entry(name("e", 4), "/"+name("s", 9), name("h", 4), name("h", 4))
		have, _ := s.Entry(e.GetId())
		switch choose(6) {
		case 0:
			cmd = entries(deleteEntry(e.GetId()))
		case 1, 2:
			cmd = entries(update(e, have.GetRevision()-uint64(choose(2)))) // 0-1 wraps: a revision that nothing has
		case 3:
			cmd = entries(create(e), create(entry(name("e", 4), "/job", name("h", 4))))
		default:
			cmd = entries(create(e))
		}
	case 21:
		cmd = stage(choose(3), uint32(choose(2)), service(name("s", 5), name("h", 4)))
	case 22:
		cmd = applyStaged(choose(3), uint32(choose(3)))
		if choose(4) == 0 {
			cmd.IfRevision = s.CatalogueRevision() - uint64(choose(2))
		}
	case 16:
		cmd = &statev1.Command{Body: &statev1.Command_Checksum{Checksum: &statev1.Checksum{AtIndex: s.Applied(), Format: ChecksumFormat, Sum: s.Checksum()}}}
	}
	return cmd
}

// run drives a state by random commands, a second replica beside it, and restarts
// that one from snapshots.
func (w *world) run(steps int, choose choose) (done map[string]int) {
	done = map[string]int{}
	replica := New()
	var log []*statev1.Command
	var kept *Snapshot
	var keptBytes []byte
	replay := func() {
		for _, cmd := range log {
			if out := replica.Apply(w.index-uint64(len(log))+1, reencode(w.t, cmd)); out.Fatal != nil || out.Diverged {
				w.t.Fatalf("the replica: %+v", out)
			}
			log = log[1:]
		}
		if !bytes.Equal(replica.Checksum(), w.s.Checksum()) {
			w.t.Fatalf("index %d: the replica has another checksum", w.index)
		}
	}
	replica.Apply(1, w.initCommand())
	replica.Apply(2, tick(epochTime))
	var last *statev1.Command
	for range steps {
		cmd := w.random(choose)
		if last != nil && choose(5) == 0 {
			cmd = last // the proposer did not hear the answer
		}
		tokenCommand := cmd.GetAttestAgent() != nil || cmd.GetJoinMember() != nil
		if last == cmd && tokenCommand {
			w.unchanged(cmd)
		} else {
			out := w.apply(cmd)
			if out.Diverged {
				w.t.Fatal("diverged from itself")
			}
			result := "done"
			if out.Refused != nil {
				result = out.Refused.Code
			}
			done[fmt.Sprintf("%T %s", cmd.GetBody(), result)]++
			if last = nil; out.Refused == nil && tokenCommand {
				last = cmd
			}
		}
		log = append(log, cmd)
		switch choose(25) {
		case 0:
			replay()
		case 1: // the replica restarts from the other's snapshot
			log = nil
			replica = w.restored()
		case 2: // a snapshot does not move with the state
			if kept != nil {
				var b bytes.Buffer
				if _, err := kept.WriteTo(&b); err != nil || !bytes.Equal(b.Bytes(), keptBytes) {
					w.t.Fatalf("an old snapshot changed: %v", err)
				}
			}
			var b bytes.Buffer
			kept = w.s.Snapshot()
			kept.WriteTo(&b)
			keptBytes = b.Bytes()
		}
	}
	replay()
	return done
}

// restored is the state after a snapshot and back, compared.
func (w *world) restored() *State {
	w.t.Helper()
	var b bytes.Buffer
	n, err := w.s.Snapshot().WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		w.t.Fatalf("wrote %d of %d bytes: %v", n, b.Len(), err)
	}
	restored, err := Restore(&b)
	if err != nil {
		w.t.Fatal(err)
	}
	before := w.look()
	after := (&world{s: restored}).look()
	if before.scalars != after.scalars || before.sum != after.sum || !maps.Equal(before.records, after.records) || !maps.Equal(before.tokens, after.tokens) {
		w.t.Fatal("a restored state differs")
	}
	if !bytes.Equal(restored.Checksum(), w.s.Checksum()) || restored.Applied() != w.s.Applied() || !restored.Now().Equal(w.s.Now()) {
		w.t.Fatal("a restored state has another checksum")
	}
	if restored.TrustDomain() != w.s.TrustDomain() || restored.Lifetimes() != w.s.Lifetimes() || !maps.Equal(restored.agentByKey, w.s.agentByKey) {
		w.t.Fatal("what a restored state derives differs")
	}
	if len(restored.entries.onHost) != len(w.s.entries.onHost) || !maps.Equal(restored.entries.lives, w.s.entries.lives) {
		w.t.Fatal("the indexes of the entries differ")
	}
	for host := range w.s.entries.onHost {
		if !slices.EqualFunc(restored.EntriesOnHost(host), w.s.EntriesOnHost(host), func(a, b *statev1.Entry) bool { return proto.Equal(a, b) }) {
			w.t.Fatalf("entries on host %s differ", host)
		}
	}
	if !reflect.DeepEqual(restored.Tables(), w.s.Tables()) { // one compiled as a whole, one by what changed
		w.t.Fatal("the tables differ")
	}
	if again, other := restored.Objects(), w.s.Objects(); len(again) == len(other) {
		for i := range again {
			if !proto.Equal(again[i], other[i]) {
				w.t.Fatalf("%v is not %v", again[i], other[i])
			}
		}
	}
	return restored
}

// TestSimulation replays from its seed. ENTENTE_SEED=N runs one seed, ENTENTE_SEEDS=N
// that many.
// Requirements: 98.
func TestSimulation(t *testing.T) {
	seeds, first := 12, 1
	if n, err := strconv.Atoi(os.Getenv("ENTENTE_SEEDS")); err == nil {
		seeds = n
	}
	if n, err := strconv.Atoi(os.Getenv("ENTENTE_SEED")); err == nil {
		seeds, first = 1, n
	}
	total := map[string]int{}
	for seed := first; seed < first+seeds; seed++ {
		t.Run(strconv.Itoa(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(seed), 0))
			for what, n := range newWorld(t).run(300, rng.IntN) {
				total[what] += n
			}
		})
	}
	if seeds < 10 {
		return
	}
	// The simulation must reach what it is there for.
	for _, what := range []string{
		"Command_ActivateAuthority done", "Command_ActivateAuthority " + CodeNotReady, "Command_ActivateAuthority " + CodePhase,
		"Command_PrepareAuthority done", "Command_JoinMember done", "Command_JoinMember " + CodeTokenSpent, "Command_JoinMember " + CodeMemberExists,
		"Command_RemoveMember done", "Command_RemoveMember " + CodeLastVoter, "Command_UpdateMember done",
		"Command_AttestAgent done", "Command_AttestAgent " + CodeTokenSpent, "Command_AttestAgent " + CodeTokenExpired,
		"Command_ApplyObjects done", "Command_ApplyObjects " + CodeCAS, "Command_ApplyObjects " + CodeNotFound, "Command_ApplyObjects " + CodeInvalid,
		"Command_StoreForeignBundle done", "Command_StoreForeignBundle " + CodeSequence, "Command_StoreForeignBundle " + CodeConflict,
		"Command_Checksum done", "Command_Tick done",
		"Command_TaintAuthority done", "Command_TaintAuthority " + CodePhase, "Command_AuthorityDrained done", "Command_AuthorityDrained " + CodePhase,
		"Command_RevokeAuthority done", "Command_RevokeAuthority " + CodePhase, "Command_RevokeAuthority " + CodeInUse,
		"Command_BanAgent done", "Command_EvictAgent done", "Command_MergeBans done", "Command_AttestAgent " + CodeAgentBanned,
		"Command_RevokeToken done", "Command_RevokeToken " + CodeTokenSpent, "Command_RevokeToken " + CodeNotFound,
		"Command_ChangeEntries done", "Command_ChangeEntries " + CodeExists, "Command_ChangeEntries " + CodeCAS, "Command_ChangeEntries " + CodeNotFound,
		"Command_ApplyObjects " + CodeExists,
		"Command_UpdateMember " + CodeFeature, "Command_StageObjects done", "Command_StageObjects " + CodeFeature, "Command_StageObjects " + CodeExists,
		"Command_ApplyStaged done", "Command_ApplyStaged " + CodeNotFound,
	} {
		if total["*statev1."+what] == 0 {
			t.Errorf("never seen: %s", what)
		}
	}
}

// The same as a property that shrinks: a failing run comes down to few commands.
func TestSnapshotProperty(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		w := newWorld(r)
		choose := func(n int) int { return rapid.IntRange(0, n-1).Draw(r, "choice") }
		w.run(rapid.IntRange(1, 40).Draw(r, "steps"), choose)
		w.restored()
	})
}

func TestDivergence(t *testing.T) {
	w := newWorld(t)
	other := w.restored()
	checksum := func(s *State) *statev1.Command {
		return &statev1.Command{Body: &statev1.Command_Checksum{Checksum: &statev1.Checksum{AtIndex: s.Applied(), Format: ChecksumFormat, Sum: s.Checksum()}}}
	}
	apply := func(cmd *statev1.Command) (Outcome, Outcome) {
		w.index++
		return w.s.Apply(w.index, reencode(t, cmd)), other.Apply(w.index, reencode(t, cmd))
	}
	at := checksum(w.s)
	apply(objects(service("a", "h1"))) // between the making and its turn
	if a, b := apply(at); a.Diverged || b.Diverged {
		t.Fatal("equal replicas diverge") // control
	}
	// A fault: a record differs that nobody looked at.
	faulty := &application{State: other, rev: other.revision}
	put(faulty, &other.agents, "ghost", &statev1.Agent{Name: "ghost"})
	if a, b := apply(checksum(w.s)); a.Diverged || !b.Diverged {
		t.Errorf("%v, %v", a, b)
	}
	// What cannot be compared is not judged.
	foreignFormat := checksum(w.s)
	foreignFormat.GetChecksum().Format++
	unknown := checksum(w.s)
	unknown.GetChecksum().AtIndex = 1 << 40
	for _, cmd := range []*statev1.Command{foreignFormat, unknown} {
		if a, b := apply(cmd); a.Diverged || b.Diverged {
			t.Errorf("%v: %v, %v", cmd, a, b)
		}
	}
}
