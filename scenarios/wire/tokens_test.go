package wire

import (
	"errors"
	"testing"

	"github.com/entente-mesh/entente/meshagent"
)

// newer is what agents of before had no settings for.
const newer = "settle: 1ms\nworkloadAPI: {wit: true}\n"

// tokens has a JWT-SVID and a WIT-SVID issued.
func tokens(t *testing.T, agent *meshagent.Agent) {
	t.Helper()
	identity, ok := agent.State().Service("accounts")
	if !ok {
		t.Fatal("no accounts")
	}
	if _, _, err := agent.FetchJWT(t.Context(), identity, []string{"vault"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "WIT-SVID", func() error {
		if identity, ok := agent.State().Service("accounts"); !ok || identity.WIT == nil {
			return errors.New("none yet")
		}
		return nil
	})
}
