package server

import (
	"bytes"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
)

// still is a state that changes when the test says so, and what other nodes state.
type still struct {
	*domain.State
	index uint64
}

func (s *still) Read(f func(*domain.State))             { f(s.State) }
func (*still) Own() (*ententev1.SignedStatement, error) { return nil, nil }
func (*still) Others() []*ententev1.SignedStatement     { return []*ententev1.SignedStatement{{}} }

func (s *still) agree(t *testing.T, cmd *statev1.Command) {
	t.Helper()
	s.index++
	if out := s.Apply(s.index, cmd); out.Refused != nil || out.Fatal != nil {
		t.Fatal(out)
	}
}

// Each stream beats in its first round, then once in all rounds of a beat where nothing
// changes, and within a round of a change. Statements go to those who compare. A stream that
// is busy holds up nobody, and one that left hears nothing.
func TestPulse(t *testing.T) {
	state := &still{State: domain.New()}
	state.agree(t, &statev1.Command{Body: &statev1.Command_Init{Init: &statev1.Init{
		Cluster: &statev1.Cluster{TrustDomain: "banking.example", Id: bytes.Repeat([]byte{1}, ca.ClusterIDSize)},
		Member: &statev1.Member{Id: domaintest.KeyID("n1"), Name: "n1", Datacenter: "dc1", Voter: true, Signing: true, FeatureLevel: domain.FeatureLevel,
			RaftAddress: "127.0.0.1:1", ApiAddress: "127.0.0.1:2"},
	}}})
	p := &pulse{server: &Server{Config: Config{State: state, Statements: state}}}
	busy, gone := p.join(true), p.join(true)
	var streams []*beating
	for i := range 3 * slots {
		streams = append(streams, p.join(i%2 == 0))
	}
	p.leave(gone)
	// round plays one, and says who beat, and how many at once.
	round := func() (beats map[*beating]int, most int) {
		beats = map[*beating]int{}
		for slot := range slots {
			p.beat(slot)
			here := 0
			for _, b := range streams {
				select {
				case message := <-b.due:
					beat := message.GetHeartbeat()
					if beat.GetRevision() != state.Revision() || len(beat.GetStatements()) > 0 && !b.statements {
						t.Errorf("a beat says %v", beat)
					}
					beats[b]++
					here++
				default:
				}
			}
			most = max(most, here)
		}
		return beats, most
	}
	for n, want := range []int{len(streams), len(streams) / rounds, len(streams) / rounds, len(streams) / rounds} {
		beats, most := round()
		if len(beats) != want || most > want/slots+2 {
			t.Errorf("round %d: %d of %d streams beat, %d at once; want %d", n, len(beats), len(streams), most, want)
		}
	}
	state.agree(t, domaintest.Prepare(state.Cluster(), domaintest.Authority("n1", "first", "banking.example", statev1.KeyUse_KEY_USE_X509, time.Unix(1_800_000_000, 0), state.Lifetimes().Phase)))
	if beats, _ := round(); len(beats) != len(streams) {
		t.Errorf("%d of %d streams hear of a change", len(beats), len(streams))
	}
	if len(busy.due) != 1 || len(gone.due) != 0 {
		t.Errorf("a busy stream has %d beats to send, one that left %d", len(busy.due), len(gone.due))
	}
	if whole := slotEvery * slots * rounds; whole > beatEvery || beatEvery-whole > slotEvery*slots {
		t.Errorf("all rounds take %v, not %v", whole, beatEvery)
	}
}
